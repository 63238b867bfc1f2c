"""Norm, factor and fusion of two branches: the readable reference, and Triton kernels where there are some.

Shape letters: s tokens, b samples, c channels of a branch (c1 and c2 where they differ).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.kernels.norms import DTYPES, rms_norm_reference
from megatron_hybrid.kernels.triton_use import can_run

SIGNS = {"add": 1, "diff": -1}


def fuse_reference(
    xs: tuple[Tensor, Tensor],
    factors: tuple[Tensor | None, Tensor | None],
    groups: tuple[int, int] | None,
    eps: float,
    fusion: str,
) -> Tensor:
    """f_1 Norm(x_1) (+) f_2 Norm(x_2), computed in fp32 (fp64 for fp64) and returned in the dtype of x_1.

    Args:
        xs: Branches, [s, b, c1] and [s, b, c2]; equally wide but for ``concat``.
        factors: One for each channel, [c1] and [c2], or None for one.
        groups: Groups of channels of each branch that its RMSNorm takes; None: there is no norm.
        eps: Added to the mean squares.
        fusion: ``add``, ``diff`` (first minus second) or ``concat``.

    Returns:
        [s, b, c], or [s, b, c1 + c2].
    """
    wide = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    if groups is None:
        first, second = (x.to(wide) if f is None else x.to(wide) * f.to(wide) for x, f in zip(xs, factors, strict=True))
    else:
        first, second = (rms_norm_reference(x, f, eps, g) for x, f, g in zip(xs, factors, groups, strict=True))
    fused = torch.cat([first, second], -1) if fusion == "concat" else first + SIGNS[fusion] * second
    return fused.to(xs[0].dtype)


def has_fusion_kernel(
    xs: tuple[Tensor, Tensor], with_factors: bool, groups: tuple[int, int] | None, fusion: str
) -> bool:
    """Whether :func:`fuse` has kernels for these branches, and saves passes over torch's operations."""
    if not all(can_run(x) and x.numel() and x.dtype in DTYPES for x in xs):
        return False
    if groups is None and (fusion == "concat" or not with_factors):
        return False  # torch's concatenation, sum or difference is one pass
    from megatron_hybrid.kernels.triton.branch_fusion import WIDEST_SUM
    from megatron_hybrid.kernels.triton.norm_tiles import WIDEST

    widths = [x.shape[-1] // g for x, g in zip(xs, groups or (1, 1), strict=True)]
    if fusion == "concat":
        return max(widths) <= WIDEST
    return widths[0] == widths[1] <= WIDEST_SUM


def fuse(
    xs: tuple[Tensor, Tensor],
    factors: tuple[Tensor | None, Tensor | None],
    groups: tuple[int, int] | None,
    eps: float,
    fusion: str,
) -> Tensor:
    """:func:`fuse_reference` by Triton kernels, where :func:`has_fusion_kernel` says so."""
    return _Fuse.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in xs), *factors, groups, eps, fusion)


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, f1: Tensor | None, f2: Tensor | None, groups: tuple[int, int] | None,
        eps: float, fusion: str,
    ) -> Tensor:  # fmt: skip
        from megatron_hybrid.kernels.triton import branch_fusion, rms_norm

        ctx.groups, ctx.fusion = groups, fusion
        if fusion == "concat":
            assert groups is not None
            out = x1.new_empty(*x1.shape[:-1], x1.shape[-1] + x2.shape[-1])
            places = out.split([x1.shape[-1], x2.shape[-1]], -1)
            one = rms_norm.rms_norm_forward(x1, f1, groups[0], eps, places[0])
            other = rms_norm.rms_norm_forward(x2, f2, groups[1], eps, places[1])
        else:
            shared = None if groups is None else groups[0]
            out, (one, other) = branch_fusion.add_forward(x1, x2, (f1, f2), shared, eps, SIGNS[fusion])
        ctx.save_for_backward(x1, x2, f1, f2, one, other)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_hybrid.kernels.triton import branch_fusion, rms_norm

        x1, x2, f1, f2, one, other = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        if ctx.fusion == "concat":
            d1, d2 = dy.split([x1.shape[-1], x2.shape[-1]], -1)
            dx1, dx2 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (x1, x2))
            df1 = rms_norm.rms_norm_backward(d1, x1, f1, one, None, dx1)
            df2 = rms_norm.rms_norm_backward(d2, x2, f2, other, None, dx2)
        else:
            shared = None if ctx.groups is None else ctx.groups[0]
            dx1, dx2, df1, df2 = branch_fusion.add_backward(
                dy, x1, x2, (f1, f2), (one, other), shared, SIGNS[ctx.fusion]
            )
        df1, df2 = (None if d is None else d.to(f.dtype) for d, f in ((df1, f1), (df2, f2)))
        return dx1, dx2, df1, df2, None, None, None
