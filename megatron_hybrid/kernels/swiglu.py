"""SwiGLU, with a factor for each row or without: one kernel each way on CUDA, torch's operations elsewhere.

Shape letters: n rows, f channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_use import can_run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(y: Tensor, p: Tensor | None = None) -> Tensor:
    """``silu(y[..., :f]) * y[..., f:] * p``, computed in fp32 and rounded once.

    Args:
        y: [..., 2f] of :data:`DTYPES`.
        p: [...], or None for 1.

    Returns:
        [..., f] of the type of y.
    """
    return _SwiGLU.apply(y, p)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, p: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, p)
        found = swiglu_forward(y.reshape(-1, y.shape[-1]), None if p is None else p.reshape(-1))
        return found.view(*y.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        y, p = ctx.saved_tensors
        flat = None if p is None else p.reshape(-1)
        dy, dp, _ = swiglu_backward(y.reshape(-1, y.shape[-1]), flat, g.reshape(-1, g.shape[-1]), again=False)
        return dy.view(y.shape), None if dp is None else dp.view(p.shape)


def swiglu_forward(y: Tensor, p: Tensor | None) -> Tensor:
    """y [n, 2f] and p [n] to [n, f], without autograd."""
    if can_run(y):
        from .triton import weighted_swiglu

        return weighted_swiglu.forward(y.contiguous(), None if p is None else p.contiguous())
    gate, value = y.float().chunk(2, dim=-1)
    product = F.silu(gate) * value
    return (product if p is None else product * p[:, None]).to(y.dtype)


def swiglu_backward(
    y: Tensor, p: Tensor | None, g: Tensor, again: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient g [n, f]: those of y [n, 2f] and p [n]; and with ``again`` the forward's result [n, f]."""
    if can_run(y):
        from .triton import weighted_swiglu

        p = None if p is None else p.contiguous()
        return weighted_swiglu.backward(y.contiguous(), p, g.contiguous(), again)
    gate, value = y.float().chunk(2, dim=-1)
    s, wide = torch.sigmoid(gate), g.float()
    product = gate * s * value
    dp = None if p is None else (product * wide).sum(-1).to(p.dtype)
    if p is not None:
        wide, product = wide * p[:, None], product * p[:, None]
    dy = torch.cat([wide * value * s * (1 + gate * (1 - s)), wide * gate * s], -1)
    return dy.to(y.dtype), dp, product.to(y.dtype) if again else None
