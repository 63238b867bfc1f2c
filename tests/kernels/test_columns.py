"""Columns of a padded tensor: as torch's split, with zeros for the gradient of the padding."""

import pytest
import torch

from megatron_hybrid.kernels.columns import split_columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("widths", "padding"), [([3, 5], 4), ([6], 2), ([4, 1, 3], 0)])
def test_equals_torch_split(widths, padding, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, sum(widths) + padding, dtype=dtype, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    ours, theirs = split_columns(x, widths), same.split([*widths, padding], -1)[: len(widths)]
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got, wanted) and got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    gradients = [torch.randn(2, 3, width, dtype=dtype) for width in widths]
    torch.autograd.backward(ours, gradients)
    torch.autograd.backward(theirs, gradients)
    assert torch.equal(x.grad, same.grad) and x.grad.is_contiguous()
    assert not x.grad[..., sum(widths) :].any()


def test_columns_without_a_gradient_get_zeros():
    x = torch.randn(2, 7, requires_grad=True)
    split_columns(x, [2, 3])[1].sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]] * 2
