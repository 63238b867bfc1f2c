"""SwiGLU times a factor for each row, in Triton: one kernel each way.

Shape letters: n rows, f channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(y, p, out, rows, width, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y [n, 2f] and p [n] to silu(y[:, :f]) * y[:, f:] * p [n, f]."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (r < rows)[:, None] & (c < width)[None, :]
    at = y + r[:, None] * (2 * width) + c[None, :]
    a = tl.load(at, there, other=0.0).to(tl.float32)
    b = tl.load(at + width, there, other=0.0).to(tl.float32)
    product = a * tl.sigmoid(a) * b
    if WEIGHTED:
        product *= tl.load(p + r, r < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + r[:, None] * width + c[None, :], product.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def swiglu_gradients_kernel(
    y,
    p,
    g,
    dy,
    dp,
    out,
    rows,
    width,
    WEIGHTED: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g [n, f] to the gradients of y [n, 2f] and p [n]; and the forward pass's result once more, if AGAIN."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(p + r, inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        there = inside[:, None] & (c < width)[None, :]
        at = r[:, None] * (2 * width) + c[None, :]
        a = tl.load(y + at, there, other=0.0).to(tl.float32)
        b = tl.load(y + at + width, there, other=0.0).to(tl.float32)
        d = tl.load(g + r[:, None] * width + c[None, :], there, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        product = a * s * b
        total += tl.sum(product * d, 1)
        d *= weight[:, None]
        tl.store(dy + at, (d * b * s * (1.0 + a * (1.0 - s))).to(dy.dtype.element_ty), there)
        tl.store(dy + at + width, (d * a * s).to(dy.dtype.element_ty), there)
        if AGAIN:
            product *= weight[:, None]
            tl.store(out + r[:, None] * width + c[None, :], product.to(out.dtype.element_ty), there)
    if WEIGHTED:
        tl.store(dp + r, total.to(dp.dtype.element_ty), inside)


def _tile(width: int) -> dict[str, int]:
    block = min(1024, triton.next_power_of_2(width))
    return {"ROWS": max(1, 2048 // block), "BLOCK": block}


def forward(y: Tensor, p: Tensor | None) -> Tensor:
    """y [n, 2f], contiguous, and p [n] (None: 1) to [n, f] of y's type, computed in fp32."""
    rows, width = len(y), y.shape[1] // 2
    out = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    if out.numel():
        tile = _tile(width)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
        swiglu_kernel[grid](y, p, out, rows, width, WEIGHTED=p is not None, **tile)
    return out


def backward(y: Tensor, p: Tensor | None, g: Tensor, again: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of y [n, 2f] and p [n] from the gradient g [n, f] of the forward pass's result; all contiguous.

    The sum for p is taken in fp32, in one order. With ``again`` also the forward pass's result [n, f].
    """
    rows, width = g.shape
    dy, out = torch.empty_like(y), torch.empty_like(g) if again else None
    dp = None if p is None else torch.zeros_like(p)
    if g.numel():
        tile = _tile(width)
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        swiglu_gradients_kernel[grid](y, p, g, dy, dp, out, rows, width, WEIGHTED=p is not None, AGAIN=again, **tile)
    return dy, dp, out
