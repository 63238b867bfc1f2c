"""Which experts a token goes to, by sigmoids and a bias, and with what probabilities.

Shape letters: t tokens, e experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_EXPERTS = 1024
"""Of a kernel's tile."""


def choose_experts(logits: Tensor, bias: Tensor | None, topk: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A token's experts: those of its ``topk`` largest ``sigmoid(logits) + bias``; of equal ones the first.

    Args:
        logits: [t, e] fp32, where Triton's kernels run.
        bias: [e], which chooses and weighs nothing; or None.
        topk: At most e.
        scale: Of the probabilities.

    Returns:
        Probabilities [t, e] fp32: ``sigmoid(logits)`` of the chosen, divided by their sum if there are several, times
        ``scale``; 0 elsewhere. And which are chosen, [t, e] bool.
    """
    return _Choice.apply(logits, bias, topk, scale)


def choose_experts_reference(
    logits: Tensor, bias: Tensor | None, topk: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`choose_experts` by its words."""
    scores = torch.sigmoid(logits)
    keys = scores.detach() if bias is None else scores.detach() + bias
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, keys.topk(topk, 1).indices, True)
    probabilities = scores * chosen
    if topk > 1:
        probabilities = probabilities / (probabilities.sum(1, keepdim=True) + 1e-20)
    return probabilities * scale, chosen


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, topk: int, scale: float) -> tuple[Tensor, Tensor]:
        from .triton.sigmoid_routing import route

        logits = logits.contiguous()
        probabilities, chosen = route(logits, bias, topk, scale)
        ctx.save_for_backward(logits, chosen)
        ctx.topk, ctx.scale = topk, scale
        ctx.mark_non_differentiable(chosen)
        return probabilities, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        from .triton.sigmoid_routing import route_backward

        logits, chosen = ctx.saved_tensors
        return route_backward(logits, chosen, g.contiguous(), ctx.topk, ctx.scale), None, None, None
