"""The kernel that splits and rotates, by Triton's interpreter, against Megatron's operations in float64."""

import pytest
import torch

from megatron_hybrid.kernels.columns import split_columns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, turns_of
from tests.support.rotation_cases import LAYOUTS, TOLERANCE, angles, errors

pytestmark = pytest.mark.triton_interpreter


def too_large(found, dtype):
    return {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradient(layout, interleaved, dtype):
    assert too_large(errors(LAYOUTS[layout], 37, 3, dtype, interleaved=interleaved), dtype) == {}


CASES = {
    "some-channels": {"channels": 6},
    "some-channels-interleaved": {"channels": 6, "interleaved": True},
    "no-rope": {"channels": 0},
    "factor": {"factor": 1.3},
    "one-sample": {"batch": 1},
    "one-token": {"length": 1},
    "one-of-both": {"length": 1, "batch": 1},
    "samples-first": {"samples_first": True},
    "columns": {"inside": (16, 24)},
    "columns-of-one-sample": {"inside": (16, 24), "batch": 1},
    "odd-columns": {"inside": (3, 0)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["grouped", "parts"])
def test_other_settings(layout, case):
    settings = {"length": 19, "batch": 2, "dtype": torch.float32, "copy_values": layout == "grouped"} | CASES[case]
    assert too_large(errors(LAYOUTS[layout], **settings), torch.float32) == {}


def test_a_comparison_can_fail():
    assert errors(LAYOUTS["grouped"], 9, 2, torch.float32, factor=1.0001)["q"] < 1e-6
    heads = LAYOUTS["grouped"]._replace(queries=1, keys=3)
    turn = angles(9, 16, False)
    x = torch.randn(9, 2, heads.columns)
    q = split_and_rotate(x, heads, turns_of(turn))[0]
    assert (q - split_and_rotate(x, heads, turns_of(turn, interleaved=True))[0]).abs().max() > 1e-2


def test_the_gradient_stands_in_that_of_the_whole_projection():
    """Nothing is copied: the kernel's tensor is a part of the whole gradient."""
    heads = LAYOUTS["parts"]
    x = torch.randn(5, 2, 8 + heads.columns + 8, requires_grad=True)
    wide, gradients, parts = 1 * x, [], []
    wide.register_hook(gradients.append)
    own = split_columns(wide, [8, heads.columns, 8])[1]
    own.register_hook(parts.append)
    q, k, v = split_and_rotate(own, heads, turns_of(angles(5, 12, False)), copy_values=False)
    assert v.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    (q.sum() + k.square().sum() + v.sum()).backward()
    assert parts[0].untyped_storage().data_ptr() == gradients[0].untyped_storage().data_ptr()
    assert not gradients[0][..., :8].any() and not gradients[0][..., -8:].any()


@pytest.mark.parametrize("copy_values", [True, False])
def test_only_the_table_is_kept(copy_values):
    kept = []
    x, turns = torch.randn(5, 2, 160, requires_grad=True), turns_of(angles(5, 16, False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = split_and_rotate(1 * x, LAYOUTS["grouped"], turns, copy_values)
    assert [t.data_ptr() for t in kept] == [turns.table.data_ptr()]
    assert all(t.is_contiguous() for t in found[: 3 if copy_values else 2])


def test_heads_without_a_gradient_get_zeros():
    heads = LAYOUTS["grouped"]
    x = torch.randn(3, 2, heads.columns, requires_grad=True)
    split_and_rotate(x, heads, None)[2].sum().backward()
    grouped = x.grad.view(3, 2, 2, 5, 16)
    assert not grouped[:, :, :, :4].any() and (grouped[:, :, :, 4] == 1).all()
