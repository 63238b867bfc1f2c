"""The peak that MFU is stated against, and what is no step."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hybrid.training.metrics import _Metrics
from megatron_hybrid.training.throughput import peak, peak_notes


@pytest.fixture(autouse=True)
def torch_settings_stay():
    kept = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


def on_cuda(monkeypatch, name, tf32=False):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: name)
    torch.backends.cuda.matmul.allow_tf32 = tf32


def run(**settings):
    return SimpleNamespace(
        **{"peak_tflops": None, "device": "cuda", "local_rank": 0, "bf16": False, "fp16": False, **settings}
    )


@pytest.mark.parametrize(
    ("settings", "tf32", "tflops", "name"),
    [
        ({"bf16": True}, False, 989, "H100 SXM, bf16 dense"),
        ({"fp16": True}, False, 989, "H100 SXM, fp16 dense"),
        ({}, False, 67, "H100 SXM, fp32 dense"),
        ({}, True, 494, "H100 SXM, tf32 dense"),
        ({"bf16": True, "peak_tflops": 1979.0}, False, 1979, "--peak-tflops"),
    ],
)
def test_the_peak_is_that_of_the_runs_precision(monkeypatch, settings, tf32, tflops, name):
    on_cuda(monkeypatch, "NVIDIA H100 80GB HBM3", tf32)
    found = peak(run(**settings))
    assert (found.tflops, found.name) == (tflops, name)
    assert peak_notes(run(), found) == []


def test_an_unknown_gpu_has_no_peak_and_a_run_says_so(monkeypatch):
    on_cuda(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert peak(run(bf16=True)) is None
    (note,) = peak_notes(run(), None)
    assert "MIG 1g.10gb" in note and "--peak-tflops" in note


def test_the_cpu_engine_has_no_peak():
    assert peak(run(device="cpu")) is None
    assert "CPU engine" in peak_notes(run(device="cpu"), None)[0]


def test_what_is_no_step_stops_the_clock():
    metrics = _Metrics(None, lambda samples: 1.0, None, None)
    metrics._last = 1.0
    assert metrics.stopping_the_clock(lambda x: x + 1)(2) == 3
    assert metrics._last is None
