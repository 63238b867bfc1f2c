"""The core of a Mamba-2 layer as the benchmark calls it: layouts, checks, and the search of the table."""

import math

import pytest
import torch

from megatron_hybrid.benchmarks import config_search, mamba_cores
from megatron_hybrid.benchmarks.mamba_cores import Core, Sizes
from megatron_hybrid.kernels.triton.configs import TABLE

SMALL = Sizes(length=100, batch=2, heads=4, head_dim=8, state=16, groups=2)
CPU = torch.device("cpu")


def test_sizes():
    big = Sizes(8192, 4)
    assert (big.inner, big.channels, big.columns) == (4096, 4352, 8480)
    assert big.least_bytes == 2 * 8192 * 4 * (3 * 8480 + 2 * 4096)


def test_torch_core_of_a_layer():
    (core,) = mamba_cores.cores(SMALL, CPU, torch.float64)
    assert core.name == "torch" and len(core.inputs) == len(mamba_cores.NAMES)
    y, *gradients = core.both()
    assert y.shape == (100, 2, 32) and torch.equal(core.forward(), y) and y.is_contiguous()
    assert [g.shape for g in gradients] == [t.shape for t in core.inputs]
    assert gradients[0].is_contiguous()
    assert all(g.abs().max() > 0 for g in gradients)


def test_a_core_is_causal_and_samples_are_apart():
    (core,) = mamba_cores.cores(SMALL, CPU, torch.float64)
    with torch.no_grad():
        changed = core.inputs[0].clone()
        changed[60:, 1] += 1
        same = core.call(changed, *core.inputs[1:]) == core.forward()
    assert same[:60].all() and same[:, 0].all() and not same[60:, 1].all(-1).any()


def test_errors_are_those_of_a_wrong_core(monkeypatch):
    assert mamba_cores.errors(SMALL, CPU, torch.float32) == {"torch": 0.0}
    right = mamba_cores.cores

    def with_a_wrong_one(*args):
        (core,) = right(*args)
        return [core, Core("wrong", lambda *inputs: 1.1 * core.call(*inputs), core.inputs, core.dy)]

    monkeypatch.setattr(mamba_cores, "cores", with_a_wrong_one)
    found = mamba_cores.errors(SMALL, CPU, torch.float32)
    assert found["torch"] == 0 and found["wrong"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "key",
    [key for key in TABLE if key[1] == "2" and key[0].startswith(("scan", "causal_conv"))],
    ids=lambda key: key[0],
)
def test_neighbours_of_a_line(key):
    line = dict(TABLE[key])
    found = config_search.neighbours(line)
    assert len(found) > 4 and line not in found
    for other in found:
        changed = {name for name in {*line, *other} if line.get(name) != other.get(name)}
        assert len(changed) == 1 or len(changed) == 2 and "num_warps" in changed
        assert other.get("maxnreg", 1) > 0, "without a bound there is no word of it"
        for name in config_search.DOUBLED:
            value = other.get(name, 1)
            assert math.log2(value).is_integer() and value <= config_search.MOST.get(name, 1)


def test_a_line_is_shown_as_the_table_has_it():
    shown = config_search.shown(("scan_forward", "2"), {"CHANNELS": 64, "num_warps": 4})
    assert eval(f"{{{shown}}}") == {("scan_forward", "2"): {"CHANNELS": 64, "num_warps": 4}}
