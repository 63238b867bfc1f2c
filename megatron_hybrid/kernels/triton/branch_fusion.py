"""Norm, factor and fusion of two branches, forward and backward, in Triton: f_1 Norm(x_1) (+) f_2 Norm(x_2).

Shape letters: s tokens, b samples, g groups of a norm, w channels of a group, c = g w channels of a branch. Readable
reference: :func:`megatron_hybrid.kernels.branches.fuse_reference`.

Of a concatenation, each branch is a norm that writes into its columns of the output (``rms_norm.py``). Sum and
difference are one kernel each way here: tiles are rows of one group of both branches, which are equally wide. Each
branch is read once, and the output or both gradients are written once. The sums for the gradients of the factors are
made as in ``rms_norm.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.kernels.triton.configs import launch_options
from megatron_hybrid.kernels.triton.norm_tiles import (
    aligned_strides,
    normalise,
    normalise_gradient,
    shape_class,
    tile_rows,
)

WIDEST_SUM = 4096
"""Channels of a group of a sum or difference that a program has in registers, of both branches."""


@triton.jit
def _load_factor(factor, w, exists, W: tl.constexpr, FACTOR: tl.constexpr):
    if FACTOR:
        return tl.load(factor + w, mask=exists, other=0.0).to(tl.float32)
    else:
        return tl.full((W,), 1.0, tl.float32)


@triton.jit
def fusion_kernel(
    x1, x2, factor1, factor2, out, inverses1, inverses2, rows, samples, eps,
    x1_token, x1_sample, x2_token, x2_sample, out_token, out_sample,
    SIGN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, FACTOR1: tl.constexpr,
    FACTOR2: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x1 and x2 [s, b, g w] to out [s, b, g w] and inverses [g, s b] each."""
    group = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, W)
    exists = w < WIDTH
    inside = (r < rows)[:, None] & exists[None, :]
    channel = group * WIDTH
    y1 = tl.load(tile_rows(x1 + channel, r, samples, x1_token, x1_sample, w, ALIGNED), mask=inside, other=0.0)
    y2 = tl.load(tile_rows(x2 + channel, r, samples, x2_token, x2_sample, w, ALIGNED), mask=inside, other=0.0)
    y1, y2 = y1.to(tl.float32), y2.to(tl.float32)
    if NORM:
        y1, inverse1 = normalise(y1, eps, WIDTH)
        y2, inverse2 = normalise(y2, eps, WIDTH)
        at = group.to(tl.int64) * rows + r
        tl.store(inverses1 + at, inverse1, mask=r < rows)
        tl.store(inverses2 + at, inverse2, mask=r < rows)
    y1 *= _load_factor(factor1 + channel, w, exists, W, FACTOR1)[None, :]
    y2 *= _load_factor(factor2 + channel, w, exists, W, FACTOR2)[None, :]
    to = tile_rows(out + channel, r, samples, out_token, out_sample, w, ALIGNED)
    tl.store(to, (y1 + SIGN * y2).to(out.dtype.element_ty), mask=inside)


@triton.jit
def fusion_gradients_kernel(
    dy, x1, x2, factor1, factor2, inverses1, inverses2, dx1, dx2, sums, rows, samples, dy_token, dy_sample,
    x1_token, x1_sample, x2_token, x2_sample, dx1_token, dx1_sample, dx2_token, dx2_sample,
    SIGN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, FACTOR1: tl.constexpr,
    FACTOR2: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy, x1, x2 to dx1, dx2, [s, b, g w] each; sums [2, programs, g w] in fp32 for the factors there are."""
    group = tl.program_id(1)
    w = tl.arange(0, W)
    exists = w < WIDTH
    channel = group * WIDTH
    f1 = _load_factor(factor1 + channel, w, exists, W, FACTOR1)
    f2 = _load_factor(factor2 + channel, w, exists, W, FACTOR2) * SIGN
    total1, total2 = tl.zeros((ROWS, W), tl.float32), tl.zeros((ROWS, W), tl.float32)
    at_group = group.to(tl.int64) * rows
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & exists[None, :]
        d = tl.load(tile_rows(dy + channel, r, samples, dy_token, dy_sample, w, ALIGNED), mask=inside, other=0.0)
        y1 = tl.load(tile_rows(x1 + channel, r, samples, x1_token, x1_sample, w, ALIGNED), mask=inside, other=0.0)
        y2 = tl.load(tile_rows(x2 + channel, r, samples, x2_token, x2_sample, w, ALIGNED), mask=inside, other=0.0)
        d, y1, y2 = d.to(tl.float32), y1.to(tl.float32), y2.to(tl.float32)
        d1, d2 = d * f1[None, :], d * f2[None, :]
        if NORM:
            inverse1 = tl.load(inverses1 + at_group + r, mask=r < rows, other=0.0)
            inverse2 = tl.load(inverses2 + at_group + r, mask=r < rows, other=0.0)
            y1 *= inverse1[:, None]
            y2 *= inverse2[:, None]
            d1 = normalise_gradient(d1, y1, inverse1, WIDTH)
            d2 = normalise_gradient(d2, y2, inverse2, WIDTH)
        if FACTOR1:
            total1 += d * y1
        if FACTOR2:
            total2 += SIGN * d * y2
        to1 = tile_rows(dx1 + channel, r, samples, dx1_token, dx1_sample, w, ALIGNED)
        to2 = tile_rows(dx2 + channel, r, samples, dx2_token, dx2_sample, w, ALIGNED)
        tl.store(to1, d1.to(dx1.dtype.element_ty), mask=inside)
        tl.store(to2, d2.to(dx2.dtype.element_ty), mask=inside)
    at = sums + tl.program_id(0).to(tl.int64) * (GROUPS * WIDTH) + channel + w
    if FACTOR1:
        tl.store(at, tl.sum(total1, 0), mask=exists)
    if FACTOR2:
        tl.store(at + tl.num_programs(0).to(tl.int64) * (GROUPS * WIDTH), tl.sum(total2, 0), mask=exists)


def add_forward(
    x1: Tensor, x2: Tensor, factors: tuple[Tensor | None, Tensor | None], groups: int | None, eps: float, sign: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """f_1 Norm(x_1) + sign f_2 Norm(x_2).

    Args:
        x1, x2: [s, b, c]; any strides whose last is 1.
        factors: [c] each, contiguous, or None for one.
        groups: g, of both branches; None: there is no norm.
        eps: Added to the mean squares.
        sign: 1 or -1.

    Returns:
        [s, b, c], and for each branch 1 / rms of each group and row, [g, s b] in fp32.
    """
    rows, count = x1.shape[0] * x1.shape[1], groups or 1
    width = x1.shape[-1] // count
    out = torch.empty(x1.shape, dtype=x1.dtype, device=x1.device)
    one, other = torch.empty(2, count, rows if groups else 0, dtype=torch.float32, device=x1.device)
    options = launch_options("branch_fusion_forward", shape_class(width))
    samples, strides, aligned = aligned_strides(width, x1, x2, out)
    f1, f2 = (x1 if f is None else f for f in factors)
    fusion_kernel[(triton.cdiv(rows, options["ROWS"]), count)](
        x1, x2, f1, f2, out, one, other, rows, samples, eps, *strides,
        SIGN=sign, GROUPS=count, WIDTH=width, NORM=groups is not None, FACTOR1=factors[0] is not None,
        FACTOR2=factors[1] is not None, ALIGNED=aligned, W=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    return out, (one, other)


def add_backward(
    dy: Tensor, x1: Tensor, x2: Tensor, factors: tuple[Tensor | None, Tensor | None],
    inverses: tuple[Tensor, Tensor], groups: int | None, sign: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x_1, x_2, [s, b, c] each, and of the factors, [c] in fp32; arguments as of :func:`add_forward`."""
    rows, count = x1.shape[0] * x1.shape[1], groups or 1
    channels = x1.shape[-1]
    width = channels // count
    dx1, dx2 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (x1, x2))
    options = launch_options("branch_fusion_backward", shape_class(width))
    programs = max(1, options.pop("PROGRAMS") // count)
    programs = min(programs, triton.cdiv(rows, options["ROWS"]))
    sums = torch.empty(2, programs, channels, dtype=torch.float32, device=x1.device)
    samples, strides, aligned = aligned_strides(width, dy, x1, x2, dx1, dx2)
    f1, f2 = (x1 if f is None else f for f in factors)
    fusion_gradients_kernel[(programs, count)](
        dy, x1, x2, f1, f2, *inverses, dx1, dx2, sums, rows, samples, *strides,
        SIGN=sign, GROUPS=count, WIDTH=width, NORM=groups is not None, FACTOR1=factors[0] is not None,
        FACTOR2=factors[1] is not None, ALIGNED=aligned, W=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    d1, d2 = (None if f is None else sums[i].sum(0) for i, f in enumerate(factors))
    return dx1, dx2, d1, d2
