"""A router's product: scores in fp32 from tokens and weights in bf16, without copies of the tokens in fp32.

Shape letters: t tokens, e experts, h channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_use import can_run

MOST_EXPERTS = 64
"""For which the gradients' kernel has registers."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`router_product` computes with these."""
    return x.is_cuda and can_run(x) and x.dtype == weight.dtype == torch.bfloat16 and len(weight) <= MOST_EXPERTS


def router_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32: products of bf16 values are exact in it, and sums are taken in it.

    Args:
        x: [..., h] bf16, on CUDA.
        weight: [e, h] bf16.

    Returns:
        [..., e] fp32.
    """
    return _RouterProduct.apply(x, weight)


class _RouterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        scores = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)  # [t, e]
        return scores.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        from .triton.router_gradients import gradients

        x, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1]).float().contiguous()
        dx, dw = gradients(flat, x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous())
        return dx.view_as(x), dw
