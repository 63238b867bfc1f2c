"""Products of all experts at once against upstream's loop over them, on CPUs. On CUDA: tests/gpu."""

import pytest
import torch

from tests.model.test_layouts import DP, EP2, RTOL
from tests.support import expert_pairs
from tests.support.training import folder, initial_checkpoint, losses

# bf16 keeps 8 bits: rounding differs by 2^-8 where sums are taken in another order, and two products follow each other
BF16 = 2**-6


@pytest.mark.parametrize("counts", [[5, 0, 33, 1], [0, 0, 3, 0], [16, 16]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias_activation_fusion": True}, {"gated_linear_unit": False, "activation_func": torch.nn.functional.relu}],
    ids=["swiglu", "fused-swiglu", "relu"],
)
def test_grouped_equals_looped(ranks, counts, settings):
    grouped, errors = ranks(1).run(expert_pairs.errors, counts=counts, **settings)[0]
    assert grouped
    assert len(errors) == 3 + 2 * len(counts)
    assert {name: error for name, error in errors.items() if not error <= BF16} == {}


@pytest.mark.parametrize("counts", [[5, 0, 33, 1], [0, 0, 3, 0]], ids=str)
def test_one_by_one_equals_looped(ranks, counts):
    grouped, errors = ranks(1).run(expert_pairs.errors, counts=counts, rows_for_own_product=0)[0]
    assert grouped
    assert {name: error for name, error in errors.items() if not error <= BF16} == {}


@pytest.mark.parametrize("rows", [0, float("inf")], ids=["one-by-one", "grouped"])
@pytest.mark.parametrize(
    "flags",
    [
        DP,
        f"{DP} --no-gradient-accumulation-fusion",
        f"{EP2} {DP}",
        f"{DP} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000",
    ],
    ids=["dp2", "dp2-not-fused", "ep2", "dp2-overlap"],
)
def test_grouped_experts_train_as_looped_ones(ranks, tmp_path, flags, rows):
    """Reduced gradients, gathered weights and all, as in test_parity.py."""
    where = folder(tmp_path)
    ranks(1).run(initial_checkpoint, pattern="MEPE", folder=where)
    expected = ranks(1).run(losses, pattern="MEPE", load=where, flags="")[0]
    case = {"rows_for_own_product": rows, "pattern": "MEPE", "load": where, "flags": flags}
    found = ranks(2).run(expert_pairs.losses_of_grouped, **case)
    for steps in found:
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=RTOL)


@pytest.mark.parametrize("rows", [0, float("inf")], ids=["one-by-one", "grouped"])
def test_gradients_are_accumulated_as_the_flag_says(ranks, rows):
    case = {"rows_for_own_product": rows}
    assert ranks(1).run(expert_pairs.accumulated, **case, flags=DP) == [{True}]
    assert ranks(1).run(expert_pairs.accumulated, **case, flags=f"{DP} --no-gradient-accumulation-fusion") == [{False}]
