"""Columns of a padded tensor: as torch's split, with zeros for the gradient of the padding."""

import pytest
import torch

from megatron_hybrid.kernels.columns import GradientPlace, split_columns


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


class Scale(torch.autograd.Function):
    """A reader that writes its gradient where it belongs, and remembers where that was."""

    places: list[torch.Tensor] = []

    @staticmethod
    def forward(ctx, x, factor):
        ctx.place, ctx.factor = GradientPlace(x), factor
        return x * factor

    @staticmethod
    def backward(ctx, dy):
        place = ctx.place.make()
        Scale.places.append(place)
        return place.copy_(dy * ctx.factor), None


def scaled(readers):
    """The gradient of [2, 3, 12], columns [0, 4) and [4, 9) of which are read with these factors; of a second pass."""
    Scale.places, gradients = [], []
    x = torch.randn(2, 3, 12, requires_grad=True)
    wide = 1 * x
    wide.register_hook(gradients.append)
    first, second = split_columns(wide, [4, 5])
    total = sum((read(first).sum() for read in readers), (3 * second).sum())
    for _ in range(2):
        total.backward(retain_graph=True)
    return gradients[1]


def test_a_reader_writes_its_gradient_in_place():
    gradient = scaled([lambda x: Scale.apply(x, 2.0)])
    wanted = torch.tensor([2.0] * 4 + [3.0] * 5 + [0.0] * 3).expand(2, 3, 12)
    assert torch.equal(gradient, wanted)
    place = Scale.places[-1]
    assert place.data_ptr() == gradient.data_ptr() and place.stride() == gradient.stride()


def test_the_gradients_of_two_readers_are_added():
    gradient = scaled([lambda x: Scale.apply(x, 2.0), lambda x: Scale.apply(x, 5.0), lambda x: 10 * x])
    assert torch.equal(gradient, torch.tensor([17.0] * 4 + [3.0] * 5 + [0.0] * 3).expand(2, 3, 12))
    assert Scale.places[-1].data_ptr() != Scale.places[-2].data_ptr(), "one place for each reader"


def test_any_other_tensor_gets_a_gradient_of_its_own():
    x = torch.randn(3, 8)[:, :5].requires_grad_()
    assert GradientPlace(x).make().stride() == (8, 1)
