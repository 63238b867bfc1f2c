"""Columns of one tensor whose gradients go back into one tensor, rows of which may be longer than their columns."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.like = widths, x.new_empty(0)
        ctx.shape = x.shape
        return x.split([*widths, x.shape[-1] - sum(widths)], -1)[: len(widths)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        rows, unread = ctx.shape[:-1], ctx.shape[-1] - sum(ctx.widths)
        pieces = [
            ctx.like.new_zeros(*rows, width) if gradient is None else gradient
            for gradient, width in zip(gradients, ctx.widths, strict=True)
        ]
        # one kernel for all of them, in whole aligned rows
        return torch.cat([*pieces, ctx.like.new_zeros(*rows, unread)], -1), None


def split_columns(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """Views of the columns of x, from the first on; what is behind the last of them is padding.

    As ``torch.split``, but that the gradient is made in one pass with zeros for padding, rather than copied into a
    tensor of zeros: x may be padded so that its rows are aligned, which matrix products and loads want.

    Args:
        x: [..., columns].
        widths: Of the views; their sum is at most ``columns``.

    Returns:
        Views [..., width].
    """
    return _SplitColumns.apply(x, widths)
