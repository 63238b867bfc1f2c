"""Splitting and rotating by torch's operations against Megatron's; the table; what is refused."""

import gc
import weakref

import pytest
import torch

from megatron_hybrid.kernels import qkv_rotation
from megatron_hybrid.kernels.head_columns import HeadColumns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, turns_of
from tests.support.rotation_cases import LAYOUTS, TOLERANCE, angles, errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("channels", [None, 6, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_upstreams_operations(layout, channels, interleaved, dtype):
    found = errors(LAYOUTS[layout], 11, 2, dtype, channels, interleaved, factor=1.0 if channels == 0 else 1.2)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


def test_float64_stays_exact():
    heads = LAYOUTS["parts"]
    x = torch.randn(4, 2, heads.columns, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, heads, turns_of(angles(4, 12, False))), x)


def test_all_micro_batches_share_a_table():
    angle = angles(8, 4, False)
    first = turns_of(angle)
    assert turns_of(angle).table is first.table
    assert turns_of(angle, interleaved=True).table is not first.table
    kept = weakref.ref(angle)
    del angle
    gc.collect()
    assert kept() is None


def test_a_table_of_a_validation_serves_training():
    heads = LAYOUTS["one-group"]
    with torch.inference_mode():
        angle = angles(4, 8, False)
        first = turns_of(angle)
    assert not first.table.is_inference()
    x = torch.randn(4, 1, heads.columns, requires_grad=True)
    split_and_rotate(x, heads, turns_of(angle))[0].sum().backward()
    assert x.grad.any()


def test_what_does_not_fit_is_refused():
    heads = HeadColumns(2, 2, 1, 2, 8, 8)
    x = torch.randn(4, 1, heads.columns)
    with pytest.raises(ValueError, match="79 columns, and its heads 80"):
        split_and_rotate(x[..., 1:], heads, None)
    with pytest.raises(ValueError, match="3 positions and turns 8 channels; there are 4 tokens"):
        split_and_rotate(x, heads, turns_of(angles(3, 8, False)))
    with pytest.raises(ValueError, match="turns 10 channels; there are 4 tokens and 8 channels"):
        split_and_rotate(x, heads, turns_of(angles(4, 10, False)))
    with pytest.raises(ValueError, match="2 groups of 2 value heads"):
        split_and_rotate(x, heads, None, copy_values=False)


def test_the_kernel_takes_no_cpu_tensors():
    assert not qkv_rotation.takes(torch.zeros(1))
