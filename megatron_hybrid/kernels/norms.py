"""RMSNorm over groups of channels: the readable reference, and a Triton kernel where there is one.

Shape letters: s tokens, b samples, c channels, g groups of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.kernels.triton_use import can_run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of the tensors that the kernels take."""


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, groups: int = 1) -> Tensor:
    """x / rms(x) * weight, computed in fp32 (fp64 for fp64).

    Args:
        x: [..., c].
        weight: [c], or None for one.
        eps: Added to the mean square.
        groups: The mean square is that of each of so many groups of channels.

    Returns:
        [..., c] in fp32 or fp64.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide).unflatten(-1, (groups, -1))  # [..., g, c / g]
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    return y if weight is None else y * weight.to(wide)


def has_kernel(x: Tensor, groups: int = 1) -> bool:
    """Whether :func:`rms_norm` has a kernel for x [..., c] of so many groups."""
    if not can_run(x) or not x.numel() or x.dtype not in DTYPES:
        return False
    from megatron_hybrid.kernels.triton.norm_tiles import WIDEST

    return x.shape[-1] // groups <= WIDEST


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, groups: int = 1, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of x by one kernel for each pass, and x itself for the residual connection.

    What goes on with the second value has its gradient added to that of the norm inside the kernel, where autograd
    would add the two of x in a pass of its own.

    Args:
        x: [..., c], of which :func:`has_kernel` is true.
        weight: [c], or None.
        eps: Added to the mean square.
        groups: Groups of channels, each with its own mean square.
        dtype: Of the norm; None: that of x.

    Returns:
        The norm and x, [..., c].
    """
    y, residual = _RmsNorm.apply(_three(x), weight, groups, eps, dtype or x.dtype)
    return y.view(x.shape), residual.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, groups: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from megatron_hybrid.kernels.triton.rms_norm import rms_norm_forward

        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        inverses = rms_norm_forward(x, weight, groups, eps, y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, inverses)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        from megatron_hybrid.kernels.triton.rms_norm import rms_norm_backward

        x, weight, inverses = ctx.saved_tensors
        if dy is None:
            return beside, None, None, None, None
        dy, beside = _rows(dy), None if beside is None else _rows(beside)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight = rms_norm_backward(dy, x, weight, inverses, beside, dx)
        return dx, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _three(x: Tensor) -> Tensor:
    """[..., c] as [s, b, c]."""
    x = _rows(x)
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
