"""tools/benchmarks/experts.py where there is no GPU, and the ways that it compares. On a GPU: tests/gpu."""

import pytest
import torch

from tests.support.processes import python


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    ended = python("tools/benchmarks/experts.py")
    assert ended.returncode == 2 and "no CUDA device" in ended.stderr


def state_in_each_way() -> list[tuple]:
    """What a layer of experts would be computed with, before, in each way, and after an error in the last one."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.transformer.moe import router, token_dispatcher

    from megatron_hybrid.benchmarks.expert_ways import WAYS, going
    from megatron_hybrid.layers.moe import module

    def state() -> tuple:
        patched = (token_dispatcher.permute, router.router_gating_linear, fused_bias_swiglu.swiglu)
        ours = {"megatron_hybrid" in f.__module__ for f in patched}
        return ours, module.is_swiglu.__name__ == "is_swiglu", module.ROWS_FOR_OWN_PRODUCT

    found = [state()]
    try:
        for way in WAYS.values():
            with going(way):
                found.append(state())
        with going(next(iter(WAYS.values()))):
            raise KeyError
    except KeyError:
        pass
    return [*found, state()]


def test_ways_differ_and_leave_nothing_behind(ranks):
    before, *ways, after = ranks(1).run(state_in_each_way)[0]
    assert before == after == ({True}, True, 512)
    assert ways == [({False}, False, float("inf")), ({True}, True, float("inf")), ({True}, True, 0)]
