"""Output head and cross entropy as one function, in chunks of tokens: the logits of all tokens never exist.

Each chunk's logits ``hidden @ weight.T`` are turned into losses and, in place, into their own gradient, from which the
gradients of ``hidden`` and ``weight`` follow while the chunk is there. So the forward pass has three matrix products
and the backward pass none: it only scales. That takes the weight of each token in the final loss to be known in the
forward pass, up to one factor for all tokens. Where it is not, the backward pass computes the logits once more.

The idea is that of github.com/mgmalek/efficient_cross_entropy.

Shape letters: t tokens, h hidden size, v entries of the vocabulary on this rank.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_hybrid.kernels import cross_entropy_rows

UNEVEN = (
    "linear_cross_entropy: the gradients of the losses are not the mask times one number, as the mask that was given "
    "says. Pass the mask by which the losses are multiplied, or none."
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
    *,
    chunk: int,
    best: bool = False,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross entropy of each token's label under ``softmax(hidden @ weight.T)``.

    Under tensor parallelism each rank has a slice of the vocabulary, in the order of ranks, and the hidden states of
    all tokens. The gradient of ``hidden`` is then the part of this rank's slice: the caller sums over the ranks.

    Args:
        hidden: [t, h].
        weight: [v, h], of the dtype of ``hidden``.
        labels: int64 [t], entries of the whole vocabulary. One outside of it has no logit: its loss is that of the
            largest one.
        mask: Factors [t] by which the caller multiplies the losses before summing them up and scaling the sum. The
            gradients are computed in the forward pass then. Without it they are computed in the backward pass, which
            is exact for any use of the losses and takes one more matrix product.
        group: The ranks among which the vocabulary is divided; None if it is not.
        chunk: Tokens whose logits are in memory at a time.
        best: Also find each token's largest logit on this rank.
        total: To which the backward pass adds the weight's gradient, [v, h] in fp32 (fp64 of fp64 inputs). The weight
            itself then gets none.

    Returns:
        Losses [t], in fp32 (fp64 of fp64 inputs); with ``best`` the largest logit [t] and its entry of this rank's
        slice, int64 [t], else None twice.

    Raises:
        ValueError: Shapes or dtypes that do not match; in the backward pass on CPU, gradients that are no multiple of
            the mask (on CUDA: a device-side assertion, which does not wait for the device).
    """
    t, h = hidden.shape
    if weight.dtype != hidden.dtype or weight.shape[1:] != (h,) or labels.shape != (t,) or chunk < 1:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.dtype} [{t}, {h}] takes weight of its dtype [v, {h}], labels [{t}] "
            f"and a chunk of at least 1, not weight {weight.dtype} {list(weight.shape)}, labels {list(labels.shape)} "
            f"and {chunk}"
        )
    if mask is not None and mask.shape != (t,):
        raise ValueError(f"linear_cross_entropy: the mask is [{t}], as the tokens are, not {list(mask.shape)}")
    if total is not None and (total.shape != weight.shape or total.dtype != _wide(weight.dtype)):
        raise ValueError(
            f"linear_cross_entropy: gradients of a weight {list(weight.shape)} are summed up in {_wide(weight.dtype)} "
            f"of its shape, not {total.dtype} {list(total.shape)}"
        )
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if mask is not None:
        mask = mask.detach().to(_wide(hidden.dtype))
    if group is not None and group.size() == 1:
        group = None
    head = _Head(hidden.detach(), weight.detach(), labels, group, chunk, total)
    losses, *found = _LinearCrossEntropy.apply(hidden, weight, mask, head, best, differentiable)
    return losses, *(found or (None, None))


class _Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    group: ProcessGroup | None
    chunk: int
    total: Tensor | None

    @property
    def first(self) -> int:
        """Entry of the whole vocabulary that is this rank's first."""
        return 0 if self.group is None else self.group.rank() * self.weight.shape[0]

    @property
    def kernels(self) -> Any:
        """The module with ``statistics`` and ``gradient_`` for the device of the tensors."""
        if not self.hidden.is_cuda:
            return cross_entropy_rows
        from megatron_hybrid.kernels.triton import cross_entropy

        return cross_entropy

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The tokens of each chunk and their logits [c, v], which are gone when the next ones are made."""
        t, v = self.hidden.shape[0], self.weight.shape[0]
        buffer = self.hidden.new_empty(min(self.chunk, t), v)
        for start in range(0, t, self.chunk):
            rows = slice(start, min(start + self.chunk, t))
            logits = buffer[: rows.stop - rows.start]
            torch.mm(self.hidden[rows], self.weight.t(), out=logits)
            yield rows, logits


class _Rows(NamedTuple):
    """Of the tokens of a chunk, [c] each."""

    losses: Tensor
    log_total: Tensor
    best: Tensor
    column: Tensor | None


def _rows(head: _Head, rows: slice, logits: Tensor, weights: Tensor | None, best: bool) -> _Rows:
    """Losses of a chunk; with weights, the logits are overwritten by their gradient."""
    labels = head.labels[rows]
    own = head.kernels.statistics(logits, labels, head.first, weights if head.group is None else None, best)
    maximum, total, label = own.maximum, own.total, own.label
    if head.group is not None:
        tops = torch.stack([maximum, label])
        all_reduce(tops, ReduceOp.MAX, head.group)
        maximum, label = tops
        total = total * (own.maximum - maximum).exp()
        all_reduce(total, ReduceOp.SUM, head.group)
    log_total = maximum + total.log()
    if weights is not None and head.group is not None:
        head.kernels.gradient_(logits, labels, head.first, log_total, weights)
    # a label that no rank has counts as the largest logit (core/tensor_parallel/cross_entropy.py:66)
    losses = total.log() + (maximum - torch.where(label == -math.inf, maximum, label))
    return _Rows(losses, log_total, own.maximum, own.best)


class _Gradients:
    """Gradients of the hidden states [t, h] and of the weight [v, h], the latter summed up in fp32."""

    def __init__(self, head: _Head, of_hidden: bool, of_weight: bool, total: Tensor | None = None):
        self._head, self._of_weight = head, of_weight
        self.hidden = torch.empty_like(head.hidden) if of_hidden else None
        self.weight = total

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Adds the products with the gradient [c, v] of a chunk's logits."""
        if self.hidden is not None:
            torch.mm(gradient, self._head.weight, out=self.hidden[rows])
        if self._of_weight:
            self.weight = _add_product(self.weight, gradient.t(), self._head.hidden[rows])


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b`` in fp32 (fp64 of fp64 inputs), in place; just the product without ``total``."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    a, b = a.to(_wide(a.dtype)), b.to(_wide(b.dtype))
    return torch.mm(a, b) if total is None else torch.addmm(total, a, b, out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, mask: Tensor | None, head: _Head, best: bool, differentiable: bool
    ) -> tuple[Tensor, ...]:
        gradients = _Gradients(head, *ctx.needs_input_grad[:2]) if differentiable and mask is not None else None
        found = []
        for rows, logits in head.chunks():
            weights = mask[rows] if gradients is not None and mask is not None else None
            found.append(_rows(head, rows, logits, weights, best))
            if gradients is not None:
                gradients.add(rows, logits)
        losses, log_total, top = (torch.cat([getattr(part, name) for part in found]) for name in _Rows._fields[:3])
        ctx.dtypes = hidden.dtype, weight.dtype
        if gradients is not None:
            ctx.head, ctx.total = None, head.total
            ctx.save_for_backward(mask, gradients.hidden, gradients.weight)
        elif differentiable:
            ctx.head = head._replace(hidden=None, weight=None, labels=None)
            ctx.save_for_backward(hidden, weight, head.labels, log_total)
        if not best:
            return (losses,)
        column = torch.cat([part.column for part in found])
        ctx.mark_non_differentiable(top, column)
        return losses, top, column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head is None:
            mask, of_hidden, of_weight = ctx.saved_tensors
            factor = _common_factor(upstream, mask)
            if ctx.total is not None and of_weight is not None:
                ctx.total.addcmul_(of_weight, factor)
                of_weight = None
            of_hidden, of_weight = (
                None if x is None else _scaled(x, factor, dtype)
                for x, dtype in zip((of_hidden, of_weight), ctx.dtypes, strict=True)
            )
            return of_hidden, of_weight, None, None, None, None
        hidden, weight, labels, log_total = ctx.saved_tensors
        head = ctx.head._replace(hidden=hidden, weight=weight, labels=labels)
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        gradients = _Gradients(head, of_hidden, of_weight, head.total)
        for rows, logits in head.chunks():
            head.kernels.gradient_(logits, labels[rows], head.first, log_total[rows], upstream[rows])
            gradients.add(rows, logits)
        made = gradients.weight
        made = None if made is None or made is head.total else made.to(weight.dtype)
        return gradients.hidden, made, None, None, None, None


def _common_factor(upstream: Tensor, mask: Tensor) -> Tensor:
    """The number [1] with ``upstream == mask * number``; it is 0 where the mask has no other entry.

    Raises:
        ValueError: There is none (on CUDA the device stops instead: to raise, the host would have to wait for it).
    """
    largest = mask.abs().argmax()[None]
    top = mask.gather(0, largest)
    factor = torch.where(top == 0, 0, upstream.gather(0, largest) / top)
    # losses that are not finite have such gradients, which others are to find
    same = torch.isclose(upstream, mask * factor, rtol=1e-5, atol=0, equal_nan=True).all()
    if same.is_cuda:
        torch._assert_async(same, UNEVEN)
    elif not same:
        raise ValueError(UNEVEN)
    return factor


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` of a factor [1] in fp32, which x in bf16 would round if it had no dimension."""
    return torch.mul(x, factor, out=x.new_empty(x.shape, dtype=dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
