"""Resumption with every optimizer, of models whose stages differ: prediction heads, and stages without experts."""

from typing import Any

import pytest

from tests.checkpoint.test_reshard import same
from tests.model.test_layouts import DP, EP2, PP2
from tests.support.program import program
from tests.support.training import MOE, Run, continued, folder, resumed, trained

HEADS = "ME*E-M/*-"
LAYOUTS = {
    "segments": (2, "ME|*E|-|M/*-", PP2),
    "a stage without experts": (4, "ME*E|-M/*-", f"{PP2} {EP2}"),
}
OPTIMIZERS = {
    "distributed": (DP, 1e-5),
    "plain": ("", 1e-5),
    "plain, bf16": ("--bf16", 2e-3),
    "sgd": ("--optimizer sgd", 1e-5),
}
"""Flags, and how far sums in another order carry the losses and norms of two steps apart."""


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory):
    """``one_process(flags)``: a checkpoint after two steps on one process, and that run's state there and two on."""
    known: dict[str, tuple[str, dict]] = {}

    def of(flags: str) -> tuple[str, dict]:
        if flags not in known:
            where = folder(tmp_path_factory.mktemp("one"))
            known[flags] = where, ranks(1).run(trained, pattern=HEADS, flags=flags, save=where, before=2, after=2)[0]
        return known[flags]

    return of


@pytest.mark.parametrize(
    ("optimizer", "layout"), [("distributed", "segments"), *((name, "a stage without experts") for name in OPTIMIZERS)]
)
def test_heads_and_experts_go_on_in_another_layout_and_come_back(ranks, one_process, tmp_path, optimizer, layout):
    (flags, tolerance), (size, pattern, layout_flags) = OPTIMIZERS[optimizer], LAYOUTS[layout]
    where, expected = one_process(flags)
    there = folder(tmp_path)
    found = ranks(size).run(continued, pattern=pattern, flags=f"{flags} {layout_flags}", load=where, save=there)
    for result in found:
        for ours, theirs in zip(result["steps"], expected["steps"][2:], strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance)
    last = [name for name in found[-1]["parameters"] if name.endswith(("output_layer.weight", "embeddings.weight"))]
    assert len(last) == 1, "the output layer has a weight beside the copy of the embedding"
    back = ranks(1).run(continued, pattern=HEADS, flags=flags, load=there)[0]
    assert same(back["parameters"], expected["parameters"]) == []
    assert same(back["optimizer"], expected["optimizer"]) == []
    assert back["steps"] == expected["steps"][2:]
    again = ranks(size).run(continued, pattern=pattern, flags=f"{flags} {layout_flags}", load=there)
    assert [result["steps"] for result in again] == [result["steps"] for result in found]


def sharded_by_buckets(flags: str, save: str) -> dict[str, Any]:
    """As training.trained, in upstream's default format."""
    run = Run("ME-", flags)
    steps = [run.step()]
    run.args.dist_ckpt_optim_fully_reshardable = False
    run.save(save)
    steps += [run.step() for _ in range(2)]
    return {"steps": steps, "end_parameters": run.parameters(), "end_optimizer": run.optimizer_state()}


def test_upstreams_format_loads_in_fp32_and_is_refused_in_another_layout(ranks, tmp_path):
    straight = ranks(2).run(sharded_by_buckets, flags=DP, save=folder(tmp_path))
    for found, expected in zip(
        ranks(2).run(resumed, pattern="ME-", flags=DP, load=str(tmp_path), steps=2), straight, strict=True
    ):
        assert found["steps"] == expected["steps"][1:]
        assert same(found["end_parameters"], expected["end_parameters"]) == []
        assert same(found["end_optimizer"], expected["end_optimizer"]) == []
    line = f"{MOE} --hybrid-layer-pattern ME- --print-config --load {tmp_path}"
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    [(code, _, errors)] = ranks(1).run(program, line=f"{line} {DP} {layout}".replace("\n", " "))
    assert code == 2
    assert "dp_reshardable" in errors and "--tensor-model-parallel-size 2, not 1" in errors
    [(code, _, errors)] = ranks(1).run(program, line=line.replace("\n", " "))
    assert code == 2
    assert "with --use-distributed-optimizer, and this run is by --optimizer adam in fp32 without" in errors
