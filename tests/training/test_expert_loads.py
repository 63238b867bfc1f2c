"""The share of tokens that each expert gets, against counts of what the routers return, in each layout.

Both are counts of the same decisions, so they are equal to the last digit.
"""

from collections import Counter
from typing import Any

import pytest

from tests.support import training

EXPERTS = 4
NO_BIAS = "--moe-router-score-function softmax --moe-router-pre-softmax"
"""Upstream counts tokens for the bias of sigmoid routers alone."""


def loads(pattern: str, flags: str) -> dict[str, Any]:
    """On each rank: loads of two steps, then of one more; and this rank's own decisions in them, layer by layer."""
    import torch
    from megatron.core import mpu
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_hybrid.training import expert_loads

    kept = training.MOE
    if NO_BIAS in flags:
        training.MOE = kept.replace("--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3", "")
    try:
        run = training.Run(pattern, flags)
    finally:
        training.MOE = kept
    expert_loads.count_tokens_of_experts(run.model)
    routers = [m for chunk in run.model for m in chunk.modules() if isinstance(m, TopKRouter)]
    assert all((router.expert_bias is None) == (NO_BIAS in flags) for router in routers)
    decided: list[list[int]] = []
    recompute = "--recompute-granularity" in flags

    def counting(index: int) -> Any:
        def count(module: Any, inputs: Any, outputs: Any) -> None:
            # under recomputation a micro-batch passes twice, the first time without gradients
            if torch.is_grad_enabled() != recompute:
                decided[index] = [a + int(b) for a, b in zip(decided[index], outputs[1].sum(0), strict=True)]

        return count

    for index, router in enumerate(routers):
        router.register_forward_hook(counting(index))
    found = []
    for steps in (2, 1):
        decided[:] = [[0] * EXPERTS for _ in routers]
        for _ in range(steps):
            run.step()
        found.append((expert_loads.expert_loads(run.model), [*decided]))
    with torch.no_grad():  # an evaluation
        routers[0].eval()(torch.ones(8, 1, 32))
    nothing = expert_loads.expert_loads(run.model)
    return {"stage": mpu.get_pipeline_model_parallel_rank(), "found": found, "nothing": nothing}


@pytest.mark.parametrize(
    ("ranks_wanted", "pattern", "flags", "layers"),
    [
        (1, "ME*E/ME/ME", "", ["2", "4", "mtp 1.2", "mtp 2.2"]),
        (1, "ME*E", f"{NO_BIAS} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2", ["2", "4"]),
        (1, "EPE", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", ["1", "3"]),
        (2, "ME*E", "", ["2", "4"]),
        (2, "ME*E", "--expert-model-parallel-size 2", ["2", "4"]),
        (2, "ME*E/ME", "--tensor-model-parallel-size 2 --sequence-parallel", ["2", "4", "mtp 1.2"]),
        (2, "ME*E", "--context-parallel-size 2", ["2", "4"]),
        (2, "ME|*E-/ME", "--pipeline-model-parallel-size 2", ["2", "4", "mtp 1.2"]),
    ],
    ids=["mtp", "no-bias", "recompute", "dp2", "ep2", "tp2-sp", "cp2", "pp2-mtp"],
)
def test_loads_are_the_routers_decisions(ranks, ranks_wanted, pattern, flags, layers):
    every = ranks(ranks_wanted).run(loads, pattern=pattern, flags=flags)
    for turn, steps in enumerate((2, 1)):
        decided: Counter[tuple[int, int, int]] = Counter()
        for rank in every:
            for index, tokens in enumerate(rank["found"][turn][1]):
                decided.update({(rank["stage"], index, expert): n for expert, n in enumerate(tokens)})
        # routers in the order of the stages, and of the modules in each: that of the pattern
        rows = [[decided[stage, i, e] for e in range(EXPERTS)] for stage, i in sorted({key[:2] for key in decided})]
        assert [sum(row) for row in rows] == [steps * 4 * 32] * len(layers)  # samples by tokens, one expert each
        expected = {name: [n / sum(row) for n in row] for name, row in zip(layers, rows, strict=True)}
        assert [rank["found"][turn][0] for rank in every] == [expected] * ranks_wanted
        assert len({tuple(row) for row in rows}) == len(layers), "rows that are alike would hide a wrong order"
    assert [rank["nothing"] for rank in every] == [{}] * ranks_wanted
