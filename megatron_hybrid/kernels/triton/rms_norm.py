"""RMSNorm over groups of channels with a learned factor of each channel, forward and backward, in Triton.

Shape letters: s tokens, b samples, g groups, w channels of a group. Readable reference:
:func:`megatron_hybrid.kernels.norms.rms_norm_reference`.

Forward, a program has some rows of one group: it reads them once and writes their norm, and 1 / rms, one number a row.
Backward, a program steps through rows of one group, and has the sums for the factor's gradient in registers until its
end; the sums of all programs, of which there is a fixed number, are added by one torch sum. x and dy are read once, and
dx is written once, together with the gradient that x has from elsewhere. All sums are in fp32. Offsets of rows are
64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.kernels.triton.configs import launch_options
from megatron_hybrid.kernels.triton.norm_tiles import (
    WIDEST,
    aligned_strides,
    normalise,
    normalise_gradient,
    shape_class,
    tile_rows,
)


@triton.jit
def rms_norm_kernel(
    x, factor, out, inverses, rows, samples, eps, x_token, x_sample, out_token, out_sample,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x [s, b, g w] to out [s, b, g w] and inverses [g, s b]."""
    group = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, W)
    inside = (r < rows)[:, None] & (w < WIDTH)[None, :]
    channel = group * WIDTH
    tile = tl.load(tile_rows(x + channel, r, samples, x_token, x_sample, w, ALIGNED), mask=inside, other=0.0)
    y, inverse = normalise(tile.to(tl.float32), eps, WIDTH)
    tl.store(inverses + group.to(tl.int64) * rows + r, inverse, mask=r < rows)
    if FACTOR:
        y *= tl.load(factor + channel + w, mask=w < WIDTH, other=0.0).to(tl.float32)[None, :]
    to = tile_rows(out + channel, r, samples, out_token, out_sample, w, ALIGNED)
    tl.store(to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_gradients_kernel(
    dy, x, factor, inverses, beside, dx, sums, rows, samples, dy_token, dy_sample, x_token, x_sample, beside_token,
    beside_sample, dx_token, dx_sample,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FACTOR: tl.constexpr, BESIDE: tl.constexpr, ALIGNED: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy, x and what is added to the gradient, ``beside``, to dx, [s, b, g w] each; sums [programs, g w] in fp32."""
    group = tl.program_id(1)
    w = tl.arange(0, W)
    exists = w < WIDTH
    channel = group * WIDTH
    f = tl.full((W,), 1.0, tl.float32)
    if FACTOR:
        f = tl.load(factor + channel + w, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, W), tl.float32)
    inverses += group.to(tl.int64) * rows
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & exists[None, :]
        tile = tl.load(tile_rows(x + channel, r, samples, x_token, x_sample, w, ALIGNED), mask=inside, other=0.0)
        d = tl.load(tile_rows(dy + channel, r, samples, dy_token, dy_sample, w, ALIGNED), mask=inside, other=0.0)
        inverse = tl.load(inverses + r, mask=r < rows, other=0.0)
        y, d = tile.to(tl.float32) * inverse[:, None], d.to(tl.float32)
        if FACTOR:
            total += d * y
        d_x = normalise_gradient(d * f[None, :], y, inverse, WIDTH)
        if BESIDE:
            at = tile_rows(beside + channel, r, samples, beside_token, beside_sample, w, ALIGNED)
            d_x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        to = tile_rows(dx + channel, r, samples, dx_token, dx_sample, w, ALIGNED)
        tl.store(to, d_x.to(dx.dtype.element_ty), mask=inside)
    if FACTOR:
        at = sums + tl.program_id(0).to(tl.int64) * (GROUPS * WIDTH) + channel + w
        tl.store(at, tl.sum(total, 0), mask=exists)


def rms_norm_forward(x: Tensor, factor: Tensor | None, groups: int, eps: float, out: Tensor) -> Tensor:
    """Writes the norm of x times the factor into ``out``.

    Args:
        x: [s, b, g w]; bf16, fp16 or fp32. Any strides whose last is 1.
        factor: [g w], or None for one.
        groups: g.
        eps: Added to the mean square.
        out: [s, b, g w], of any dtype and strides whose last is 1.

    Returns:
        1 / rms of each row and group, [g, s b] in fp32.

    Raises:
        ValueError: Groups that do not divide the channels or are too wide, or shapes or strides of another kind.
    """
    width = _check(x, factor, groups, out)
    rows = x.shape[0] * x.shape[1]
    inverses = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    options = launch_options("rms_norm_forward", shape_class(width))
    samples, strides, aligned = aligned_strides(width, x, out)
    rms_norm_kernel[(triton.cdiv(rows, options["ROWS"]), groups)](
        x, factor if factor is not None else x, out, inverses, rows, samples, eps, *strides,
        GROUPS=groups, WIDTH=width, FACTOR=factor is not None, ALIGNED=aligned, W=triton.next_power_of_2(width),
        **options,
    )  # fmt: skip
    return inverses


def rms_norm_backward(
    dy: Tensor, x: Tensor, factor: Tensor | None, inverses: Tensor, beside: Tensor | None, dx: Tensor
) -> Tensor | None:
    """Writes the gradient of x into ``dx``.

    Args:
        dy, x, factor: As in the forward pass, and the gradient of its output, [s, b, g w].
        inverses: What the forward pass returned.
        beside: Another gradient of x, which is added, [s, b, g w].
        dx: [s, b, g w].

    Returns:
        The factor's gradient, [g w] in fp32; None without a factor.
    """
    groups, width = len(inverses), _check(x, factor, len(inverses), dx)
    for t in (dy, beside):
        if t is not None:
            _check(t, factor, groups, dx)
    rows = x.shape[0] * x.shape[1]
    options = launch_options("rms_norm_backward", shape_class(width))
    programs = max(1, options.pop("PROGRAMS") // groups)
    programs = min(programs, triton.cdiv(rows, options["ROWS"]))
    sums = torch.empty(programs, groups * width if factor is not None else 0, dtype=torch.float32, device=x.device)
    other = beside if beside is not None else x
    samples, strides, aligned = aligned_strides(width, dy, x, other, dx)
    rms_norm_gradients_kernel[(programs, groups)](
        dy, x, factor if factor is not None else x, inverses, other, dx, sums, rows, samples, *strides,
        GROUPS=groups, WIDTH=width, FACTOR=factor is not None, BESIDE=beside is not None, ALIGNED=aligned,
        W=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    return sums.sum(0) if factor is not None else None


def _check(x: Tensor, factor: Tensor | None, groups: int, out: Tensor) -> int:
    """Channels of a group."""
    if x.dim() != 3 or not x.numel() or x.stride(-1) != 1 or out.shape != x.shape or out.stride(-1) != 1:
        raise ValueError(
            f"tensors of shapes {tuple(x.shape)} and {tuple(out.shape)}, strides {x.stride()} and {out.stride()}; both "
            "must be [s, b, channels], with a last stride of 1 and at least one token"
        )
    width, rest = divmod(x.shape[-1], groups)
    if rest or width > WIDEST:
        raise ValueError(f"{groups} groups of {x.shape[-1]} channels; groups must divide them into at most {WIDEST}")
    if factor is not None and (factor.shape != x.shape[-1:] or factor.stride(0) != 1):
        raise ValueError(f"the factor has shape {tuple(factor.shape)}; it must be contiguous, [{x.shape[-1]}]")
    return width
