"""The table of GPUs: that it agrees with itself, with the arithmetic of the chips, and refuses to guess."""

import pytest

from megatron_hybrid.costs.hardware import ALIASES, GPUS, gpu, gpu_of_device

# Multiprocessors, boost clock of matrix products in GHz (NVIDIA's architecture white papers: Ampere table 4, Hopper
# table 2), and dense bf16 FLOPs that a multiprocessor does in a clock (Ampere 2048, Hopper 4096)
CHIPS = {"a100-80gb": (108, 1.410, 2048), "h100-80gb": (132, 1.830, 4096), "h100-pcie": (114, 1.620, 4096)}


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_those_of_the_chips_arithmetic(name):
    multiprocessors, gigahertz, flops = CHIPS[name]
    # the white papers print clocks to 5 MHz of 1,400 or more
    assert gpu(name).peak("bf16") == pytest.approx(multiprocessors * gigahertz * 1e9 * flops, rel=5e-3)


@pytest.mark.parametrize("known", GPUS, ids=lambda g: g.name)
def test_a_row_agrees_with_itself(known):
    p = known.peaks
    assert p["fp16"] == p["bf16"]
    # tf32 is half of bf16 and fp8 twice; rounding down leaves a TFLOP/s, and B200's 1.1 PFLOP/s has two digits
    assert 2 * p["tf32"] == pytest.approx(p["bf16"], rel=0.025 if known.name == "b200" else 4e-3)
    assert p.get("fp8", 2 * p["bf16"]) == pytest.approx(2 * p["bf16"], rel=4e-3)
    assert 1e13 < p["fp32"] < p["tf32"]
    assert known.memory <= known.capacity < 1.09 * known.memory  # GiB read as GB are 7.4% more
    assert 1e12 < known.bandwidth < 1e13
    assert "https://" in known.source
    assert (known.nvlink is None) == (known.nvlink_gpus == 1)
    assert known.nvlink is None or known.nvlink < known.bandwidth / 4


def test_figures_of_the_h100():
    h100 = gpu("h100-80gb")
    assert (h100.peak("bf16"), h100.peak("fp8"), h100.peak("tf32")) == (989e12, 1979e12, 494e12)
    assert (h100.bandwidth, h100.nvlink, h100.nvlink_gpus) == (3.35e12, 450e9, 8)
    assert h100.capacity / 2**30 == pytest.approx(79.18, abs=0.01)
    assert h100.memory == 80e9


def test_names_and_aliases():
    names = [g.name for g in GPUS]
    assert len(set(names)) == len(names)
    assert not set(names) & set(ALIASES)
    assert {gpu(alias).name for alias in ALIASES} <= set(names)
    assert gpu("h100-sxm") is gpu("H100") is gpu("H100_80GB") is gpu("h100-80gb")
    assert gpu("h100-80gb") is not gpu("h100-pcie")


@pytest.mark.parametrize("name", ["h100-64gb", "v100", "", "mi300x"])
def test_an_unknown_gpu_is_asked_for(name):
    with pytest.raises(ValueError, match=r"not a known GPU; known are a100-40gb, .*h100-80gb.*--peak-tflops"):
        gpu(name)


def test_what_a_gpu_lacks_is_an_error():
    with pytest.raises(ValueError, match="A100 SXM 80GB has no fp8 peak; it has bf16, fp16, tf32, fp32"):
        gpu("a100").peak("fp8")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-SXM4-40GB", "a100-40gb"),  # older drivers leave the vendor out
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA H100 64GB HBM2", None),
        ("NVIDIA H800", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_torchs_names(device, name):
    found = gpu_of_device(device)
    assert (found and found.name) == name


def test_no_device_is_two_gpus():
    devices = [device for g in GPUS for device in g.devices]
    assert len(set(devices)) == len(devices)
