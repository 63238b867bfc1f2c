"""Both gradients of a router's product in one pass over the tokens, in Triton.

Shape letters: t tokens, e experts, h channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 32, 64
"""Of a tile."""
PROGRAMS = 1024
"""About as many as keep a GPU busy; the partial sums of the weight's gradient are one for each."""


@triton.jit(do_not_specialize=["tokens", "steps"])
def _gradients(
    g,
    x,
    weight,
    dx,
    parts,
    tokens,
    channels,
    steps,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """g [t, e], x [t, h], weight [e, h] to dx [t, h] = g weight, and each program's share of g^T x [e, h]."""
    share = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    e = tl.arange(0, WIDTH)
    of_weight = (e < EXPERTS)[:, None] & (c < channels)[None, :]
    at_weight = e[:, None] * channels + c[None, :]
    w = tl.load(weight + at_weight, of_weight, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH, CHANNELS), tl.float32)
    for step in range(steps):
        t = (share * steps + step).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        inside = (t < tokens)[:, None]
        scores = tl.load(g + t[:, None] * EXPERTS + e[None, :], inside & (e < EXPERTS)[None, :], other=0.0)
        scores = scores.to(tl.float32)
        there = inside & (c < channels)[None, :]
        at = t[:, None] * channels + c[None, :]
        values = tl.load(x + at, there, other=0.0).to(tl.float32)
        tl.store(dx + at, tl.dot(scores, w, input_precision="tf32x3").to(dx.dtype.element_ty), there)
        total += tl.dot(tl.trans(scores), values, input_precision="tf32x3")
    tl.store(parts + share.to(tl.int64) * EXPERTS * channels + at_weight, total, of_weight)


def gradients(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x [t, h] and weight [e, h], of their types, from that of ``x @ weight.T``.

    Sums are taken in fp32 (products of TF32 in three parts, which keep fp32's bits) and in one order.

    Args:
        g: [t, e] fp32, contiguous.
        x: [t, h], contiguous.
        weight: [e, h], contiguous.
    """
    (tokens, experts), channels = g.shape, x.shape[1]
    columns = triton.cdiv(channels, CHANNELS)
    tiles = triton.cdiv(tokens, TOKENS)
    steps = triton.cdiv(tiles, max(1, PROGRAMS // columns))
    shares = triton.cdiv(tiles, steps)
    dx = torch.empty_like(x)
    parts = torch.empty(shares, experts, channels, dtype=torch.float32, device=x.device)
    width = max(16, triton.next_power_of_2(experts))
    _gradients[(columns, shares)](
        g, x, weight, dx, parts, tokens, channels, steps, EXPERTS=experts, WIDTH=width, TOKENS=TOKENS, CHANNELS=CHANNELS
    )
    return dx, parts.sum(0).to(weight.dtype)
