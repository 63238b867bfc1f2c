"""Tokens on their way to experts and back: our kernels, by Triton's interpreter, against upstream's operations."""

import pytest
import torch

from megatron_hybrid.patches import experts
from tests.support import routed_runs
from tests.support.training import folder, initial_checkpoint

interpreted = pytest.mark.triton_interpreter
EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


@interpreted
@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ("", 64),
        ("--moe-router-topk 2", 128),
        ("--moe-router-topk 2 --moe-token-dispatcher-type allgather", 128),
        ("--moe-router-topk 3 --moe-expert-capacity-factor 0.7", None),
    ],
    ids=["top1", "top2", "allgather", "capacity"],
)
def test_a_layer_is_upstreams(ranks, flags, rows):
    (ours, went), (theirs, none) = (
        ranks(1).run(routed_runs.layer, ours=way, symbol="E", flags=flags)[0] for way in (True, False)
    )
    assert none == [] and len(went) == 1
    assert went == [rows] if rows else went[0] < 3 * 64, "a capacity leaves some out"
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-5, atol=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, found in ours["gradients"].items():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(theirs["gradients"][name]), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize(
    "flags", [EP2, TP2, f"{TP2} {EP2} --expert-tensor-parallel-size 1"], ids=["ep2", "tp2", "tp2-ep2"]
)
def test_layouts_train_as_one_process_does_upstreams_way(ranks, tmp_path, flags):
    where = folder(tmp_path)
    case = {"pattern": "E", "load": where}
    ranks(1).run(initial_checkpoint, pattern="E", folder=where)
    (expected, none) = ranks(1).run(routed_runs.losses, ours=False, **case, flags="")[0]
    assert none == []
    for found, went in ranks(2).run(routed_runs.losses, ours=True, **case, flags=flags):
        assert went
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_chunks_that_stand_in_order_are_not_copied():
    asked = []
    sort = experts.leave_sorted_chunks(lambda *args: asked.append(args))
    x, p, sizes = torch.randn(6, 2), torch.rand(6), torch.tensor([1, 3, 2])
    found = sort(x, sizes, torch.arange(3), probs=p)
    assert found[0] is x and found[1] is p and not asked
    sort(x, sizes, torch.tensor([0, 2, 1]), probs=p)
    sort(x, sizes, torch.arange(3), fused=True)
    assert len(asked) == 2
