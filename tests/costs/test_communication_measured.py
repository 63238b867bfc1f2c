"""The formulas of communication against what ranks send, exactly: ``==`` of calls and bytes, group by group."""

import pytest

from tests.costs import measure_communication
from tests.costs.measure_communication import Sent

TP = "--tensor-model-parallel-size 2 --micro-batch-size 2"
SP = f"{TP} --sequence-parallel"
CP = "--context-parallel-size 2"


def compare(found: list[tuple[Sent, Sent]], wanted_groups: set[str]) -> None:
    """Each rank's numbers; of experts the mean of the ranks: which tokens they get is the router's choice."""
    assert set().union(*(measured for measured, _ in found)) == wanted_groups
    for group in wanted_groups:
        measured, counted = ([one.get(group, (0, 0)) for one in side] for side in zip(*found, strict=True))
        if "expert" in group and "data" not in group:
            measured, counted = ([tuple(map(sum, zip(*side, strict=True)))] for side in (measured, counted))
        assert measured == counted, group


@pytest.mark.parametrize(
    "symbols, flags, groups",
    [
        ("*WMPEG-", SP, {"tensor"}),
        ("*WMPG", CP, {"context"}),
        # fewer key heads, groups of B and C, groups of norms than ranks
        ("*WMP-", f"{TP} --num-query-groups 1 --mamba-num-groups 1 --intra-norm-groups 1", {"tensor"}),
        ("MP", f"{SP} --mamba-num-groups 1 --intra-norm-groups 1 --hybrid-recompute ssm intra", {"tensor"}),
        ("MP", f"{CP} --mamba-num-groups 1 --intra-value shared --hybrid-recompute ssm intra", {"context"}),
        ("P", f"{CP} --intra-preset diff-transformer", {"context"}),
        ("E", "--expert-model-parallel-size 2 --moe-router-topk 3 --bf16", {"expert"}),
    ],
)
def test_layers(ranks, symbols, flags, groups):
    found = ranks(2).run(measure_communication.of_layers, symbols=symbols, flags=flags)
    for symbol, *of_one_layer in zip(symbols, *found, strict=True):
        compare(of_one_layer, groups | ({"expert tensor"} if symbol == "E" and flags == SP else set()))


FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"


@pytest.mark.parametrize(
    "pattern, flags, groups",
    [
        (
            "*-E",
            f"{SP} --untie-embeddings-and-output-weights --cross-entropy-loss-fusion --expert-tensor-parallel-size 1 "
            "--expert-model-parallel-size 2 --moe-shared-expert-gate",
            {"tensor", "expert"},
        ),
        ("*P/M", f"{TP} --mtp-num-layers 1 --mamba-num-groups 1 --intra-scale scalar", {"tensor"}),
        ("M-/*-", f"{SP} --mtp-num-layers 1 {FULL} uniform", {"tensor"}),
        ("GM/-", f"{SP} --mtp-num-layers 1 {FULL} block", {"tensor"}),
        ("*W-", f"{CP} --recompute-granularity selective --recompute-modules core_attn", {"context", "data"}),
        ("*PM", "--use-distributed-optimizer --bf16 --overlap-param-gather --overlap-grad-reduce", {"data"}),
        ("*E", "--use-distributed-optimizer --expert-model-parallel-size 2", {"data", "expert"}),
        ("*|M|-|W", "--pipeline-model-parallel-size 2", {"pipeline", "embedding"}),
        (
            "*|-/*",
            "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights --mtp-num-layers 1",
            {"pipeline", "embedding"},
        ),
    ],
)
def test_steps(ranks, pattern, flags, groups):
    compare(ranks(2).run(measure_communication.of_a_step, pattern=pattern, flags=flags), groups)


def test_tensor_expert_and_pipeline_parallel_ranks_together(ranks):
    flags = f"{SP} --pipeline-model-parallel-size 2 --expert-tensor-parallel-size 1 --expert-model-parallel-size 2"
    found = ranks(4).run(measure_communication.of_a_step, pattern="*|M|E|W", flags=flags)
    compare(found, {"tensor", "expert", "pipeline", "embedding"})
