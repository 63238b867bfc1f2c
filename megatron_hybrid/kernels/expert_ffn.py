"""All experts' gated FFNs at once: two grouped matrix products and one kernel between them, forward and backward.

Shape letters: n rows (tokens of the experts, by expert), e experts, h channels, f channels inside.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .swiglu import swiglu_backward, swiglu_forward
from .weight_gradient import accumulate


class Grouped:
    """Products of all experts in one kernel, which reads on the device where each one's rows end.

    The weights are put side by side first, in each pass again: stacks that are kept would be a second copy of all
    experts of the model.

    Args:
        ends: [e] int32: the row after each expert's last.
    """

    def __init__(self, ends: Tensor):
        self.ends = ends

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """x [n, in], e weights [out, in] to [n, out]."""
        return F.grouped_mm(x, torch.stack(tuple(weights)).transpose(1, 2), offs=self.ends)

    def backward(self, dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """dy [n, out], e weights [out, in] to [n, in]."""
        return F.grouped_mm(dy, torch.stack(tuple(weights)), offs=self.ends)

    def weights(self, dy: Tensor, x: Tensor) -> Sequence[Tensor]:
        """dy [n, out], x [n, in] to e gradients [out, in]; zeros for experts without rows."""
        return F.grouped_mm(dy.t(), x, offs=self.ends).unbind()

    def add_weights(self, totals: Sequence[Tensor], dy: Tensor, x: Tensor) -> None:
        """Adds the gradients of :meth:`weights` to e totals [out, in], behind the product."""
        for total, gradient in zip(totals, self.weights(dy, x), strict=True):
            total.add_(gradient)


class OneByOne:
    """A product for each expert, which the host starts with its number of rows: nothing is copied.

    Args:
        counts: Rows of each expert.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = list(counts)

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """x [n, in], e weights [out, in] to [n, out]."""
        return self._products(x, [w.t() for w in weights])

    def backward(self, dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """dy [n, out], e weights [out, in] to [n, in]."""
        return self._products(dy, weights)

    def weights(self, dy: Tensor, x: Tensor) -> Sequence[Tensor]:
        """dy [n, out], x [n, in] to e gradients [out, in]; zeros for experts without rows."""
        pairs = zip(dy.split(self.counts), x.split(self.counts), strict=True)
        return [torch.mm(d.t(), rows) for d, rows in pairs]

    def add_weights(self, totals: Sequence[Tensor], dy: Tensor, x: Tensor) -> None:
        """Adds the gradients of :meth:`weights` to e totals [out, in], inside the products."""
        for total, d, rows in zip(totals, dy.split(self.counts), x.split(self.counts), strict=True):
            if len(rows):
                accumulate(total, d, rows)

    def _products(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        out = x.new_empty(len(x), weights[0].shape[1])
        for rows, weight, found in zip(x.split(self.counts), weights, out.split(self.counts), strict=True):
            torch.mm(rows, weight, out=found)
        return out


def expert_ffn(
    x: Tensor,
    p: Tensor,
    products: Grouped | OneByOne,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    add_to_main_grad: bool = False,
) -> Tensor:
    """``(silu(x_i a.T) * (x_i b.T) * p_i) second.T`` for each row i, with its expert's weights.

    The backward pass computes the input of the second product again: n f values less to keep.

    Args:
        x: [n, h], by expert.
        p: [n] routing probabilities.
        products: How the rows are divided among the experts, and how products are done.
        first: e weights [2 f, h]; a is the first half, b the second one.
        second: e weights [h, f].
        add_to_main_grad: Gradients of weights that have ``main_grad`` are added to that in the backward pass, and
            ``grad_added_to_main_grad`` is set, as Megatron's DDP wants it of fused gradient accumulation.

    Returns:
        [n, h].
    """
    return _ExpertFFN.apply(x, p, products, add_to_main_grad, *first, *second)


def expert_ffn_reference(
    x: Tensor, p: Tensor, counts: Sequence[int], first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """:func:`expert_ffn` by its words, with the rows of each expert in ``counts``."""
    found = []
    for rows, weight, w1, w2 in zip(x.split(counts), p.split(counts), first, second, strict=True):
        gate, value = (rows @ w1.T).chunk(2, dim=-1)  # [rows, f] each
        found.append((F.silu(gate) * value * weight[:, None]) @ w2.T)
    return torch.cat(found)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, products: Grouped | OneByOne, add: bool, *weights: Tensor) -> Tensor:
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        y = products.forward(x, first)  # [n, 2 f]
        ctx.save_for_backward(x, p, y, *weights)
        ctx.products, ctx.parameters = products, weights if add else None
        return products.forward(swiglu_forward(y, p), second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, p, y, *weights = ctx.saved_tensors
        half, products = len(weights) // 2, ctx.products
        first, second = weights[:half], weights[half:]
        dout = dout.contiguous()
        g = products.backward(dout, second)  # [n, f]
        dy, dp, inner = swiglu_backward(y, p, g)
        del g
        d_second = _weight_gradients(ctx, slice(half, None), dout, inner)
        del inner
        d_first = _weight_gradients(ctx, slice(0, half), dy, x)
        dx = products.backward(dy, first) if ctx.needs_input_grad[0] else None
        return dx, dp, None, None, *d_first, *d_second


def _weight_gradients(ctx: Any, chosen: slice, dy: Tensor, x: Tensor) -> Sequence[Tensor | None]:
    """Gradients of the chosen weights [out, in] from dy [n, out] and x [n, in], or what DDP's hooks take for such."""
    wanted = ctx.needs_input_grad[4:][chosen]
    if not any(wanted):
        return [None] * len(wanted)
    parameters = ctx.parameters[chosen] if ctx.parameters else []
    if not parameters or not all(wanted) or not all(hasattr(w, "main_grad") for w in parameters):
        return ctx.products.weights(dy, x)
    ctx.products.add_weights([w.main_grad for w in parameters], dy, x)
    # A hook that is called with a gradient says that the weight is done; nobody reads these
    unread = parameters[0].new_empty(parameters[0].shape)
    for w in parameters:
        w.grad_added_to_main_grad = True
    return [unread.view(w.shape) for w in parameters]
