"""Columns of one tensor whose gradients go back into one tensor, rows of which may be longer than their columns."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientRows:
    """The gradient of a tensor that :func:`split_columns` has split, before all of its columns are known."""

    def __init__(self, like: Tensor):
        self._shape, self._like = like.shape, like.new_empty(0)
        self._rows: Tensor | None = None
        self._given: set[int] = set()

    def columns(self, start: int, width: int) -> Tensor | None:
        """Columns for their reader to write its gradient into; None if another reader has them."""
        if start in self._given:
            return None
        self._given.add(start)
        return self._whole().narrow(-1, start, width)

    def take(self) -> Tensor:
        """All of them, once for each backward pass."""
        whole, self._rows = self._whole(), None
        self._given.clear()
        return whole

    def _whole(self) -> Tensor:
        if self._rows is None:
            self._rows = self._like.new_empty(self._shape)
        return self._rows


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int], rows: GradientRows) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.rows = widths, rows
        return x.split([*widths, x.shape[-1] - sum(widths)], -1)[: len(widths)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        whole, start = ctx.rows.take(), 0
        for gradient, width in zip(gradients, ctx.widths, strict=True):
            place = whole.narrow(-1, start, width)
            if gradient is None:
                place.zero_()
            elif gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride():
                place.copy_(gradient)
            start += width
        whole.narrow(-1, start, whole.shape[-1] - start).zero_()
        return whole, None, None


def split_columns(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """Views of the columns of x, from the first on; what is behind the last of them is padding.

    As ``torch.split``, but for the gradient: it is made in one tensor with zeros for padding, and a reader may write
    its part there itself (:class:`GradientPlace`), so that nothing is copied.

    Args:
        x: [..., columns], contiguous.
        widths: Of the views; their sum is at most ``columns``.

    Returns:
        Views [..., width].
    """
    rows = GradientRows(x)
    views = _SplitColumns.apply(x, widths, rows)
    for view, end in zip(views, accumulate(widths), strict=True):
        view.gradient_rows = (rows, end - view.shape[-1])
    return views


class GradientPlace:
    """Where the reader of x puts its gradient: the columns of a gradient that is made anyway, or a tensor of its own.

    To be made in the forward pass of the reader, of x itself: :func:`split_columns` has marked that tensor.
    """

    def __init__(self, x: Tensor):
        self._shape, self._stride, self._like = x.shape, x.stride(), x.new_empty(0)
        marked: tuple[GradientRows | None, int] = getattr(x, "gradient_rows", (None, 0))
        self._rows, self._start = marked

    def make(self) -> Tensor:
        """An uninitialised tensor with the shape and the strides of x."""
        place = None if self._rows is None else self._rows.columns(self._start, self._shape[-1])
        if place is not None and place.shape == self._shape:
            return place
        return torch.empty_strided(self._shape, self._stride, dtype=self._like.dtype, device=self._like.device)
