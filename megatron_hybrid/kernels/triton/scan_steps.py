"""Step sizes of the Mamba-2 scan and their running sums in each chunk, and the backward pass of both.

    dt = clamp(softplus(raw + bias), low, high)        sum_t = sum of dt A over the chunk's tokens up to t

Shape letters: b batch, s tokens, h heads, c chunks, v blocks of a head's channels (``ssd_scan.py``). Both results are
fp32 [b, h, c CHUNK]: a head's tokens side by side. Tokens behind the end have dt 0, so that they change no sum.
"""

import math

import torch
import triton
import triton.language as tl

LOG_TINY = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))
"""Bound of dt A, as in ``kernels/ssd.py``: exp of it is as good as zero."""


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate for small results, too: Kahan's correction of the rounding in 1 + u."""
    u = tl.exp(tl.minimum(x, 20.0))
    y = 1.0 + u
    small = tl.where(y == 1.0, u, tl.log(y) * (u / tl.where(y == 1.0, 1.0, y - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _raw_steps(raw, bias, b, t, h, inside, raw_b, raw_s, heads, HAS_BIAS: tl.constexpr):
    """raw + bias, [CHUNK, HEADS] fp32."""
    at = raw + b.to(tl.int64) * raw_b + t.to(tl.int64)[:, None] * raw_s + h[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + h, mask=h < heads, other=0.0)[None, :]
    return x


@triton.jit
def steps_kernel(
    raw, bias, A, steps, sums,
    raw_b, raw_s, length, heads, chunks, low, high,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """raw [b, s, h] to steps and sums; one chunk of HEADS heads per program."""
    b, c = tl.program_id(1), tl.program_id(0)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    t = c * CHUNK + tl.arange(0, CHUNK)
    inside = (t < length)[:, None] & (h < heads)[None, :]
    dt = _raw_steps(raw, bias, b, t, h, inside, raw_b, raw_s, heads, HAS_BIAS)  # [CHUNK, HEADS]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(inside, tl.minimum(tl.maximum(dt, low), high), 0.0)
    rate = tl.load(A + h, mask=h < heads, other=0.0)[None, :]
    summed = tl.cumsum(tl.maximum(dt * rate, LOG_TINY), 0)
    at = (b * heads + h).to(tl.int64)[None, :] * (chunks * CHUNK) + t[:, None]
    tl.store(steps + at, dt, mask=(h < heads)[None, :])
    tl.store(sums + at, summed, mask=(h < heads)[None, :])


@triton.jit
def steps_backward_kernel(
    raw, bias, A, d_steps, d_rows, d_columns, d_whole, d_raw, d_A, d_bias,
    raw_b, raw_s, out_b, out_s, length, heads, chunks, batch, low, high,
    BLOCKS: tl.constexpr, SENDER_BLOCKS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """From the gradients that ``scan_gradient.py`` leaves to those of raw, A and bias.

    d_steps, d_rows and d_columns are [v, b, h, c CHUNK], d_whole [b, c, h]; d_A and d_bias get one row per chunk,
    [b, c, h]. The decay dt_t A of token t is part of every pair of a later or the same token (rows) with an earlier one
    (columns); d_rows has, for each token, its pairs as the later minus those as the earlier token, so that the sum over
    tokens from t on leaves those around t. dt times d_columns is its part in the state at the chunk's end, which all
    later decays shrink.
    """
    b, c = tl.program_id(1), tl.program_id(0)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    t = c * CHUNK + tl.arange(0, CHUNK)
    inside = (t < length)[:, None] & (h < heads)[None, :]
    direct = tl.zeros((CHUNK, HEADS), tl.float32)
    rows = tl.zeros((CHUNK, HEADS), tl.float32)
    columns = tl.zeros((CHUNK, HEADS), tl.float32)
    whole = tl.load(d_whole + (b * chunks + c) * heads + h, mask=h < heads, other=0.0)
    for v in tl.static_range(BLOCKS):
        at = ((v * batch + b) * heads + h).to(tl.int64)[None, :] * (chunks * CHUNK) + t[:, None]
        direct += tl.load(d_steps + at, mask=inside, other=0.0)
        rows += tl.load(d_rows + at, mask=inside, other=0.0)
    for v in tl.static_range(SENDER_BLOCKS):
        at = ((v * batch + b) * heads + h).to(tl.int64)[None, :] * (chunks * CHUNK) + t[:, None]
        columns += tl.load(d_columns + at, mask=inside, other=0.0)
    x = _raw_steps(raw, bias, b, t, h, inside, raw_b, raw_s, heads, HAS_BIAS)
    soft = softplus(x) if SOFTPLUS else x
    dt = tl.minimum(tl.maximum(soft, low), high)
    rate = tl.load(A + h, mask=h < heads, other=0.0)[None, :]
    before = dt * columns
    d_a = tl.cumsum(rows, 0, reverse=True) + (tl.cumsum(before, 0) - before) + whole[None, :]
    d_a = tl.where(inside & (dt * rate >= LOG_TINY), d_a, 0.0)
    d_dt = tl.where((soft >= low) & (soft <= high), direct + columns + d_a * rate, 0.0)
    if SOFTPLUS:
        d_dt *= tl.sigmoid(x)
    d_dt = tl.where(inside, d_dt, 0.0)
    at = d_raw + b.to(tl.int64) * out_b + t.to(tl.int64)[:, None] * out_s + h[None, :]
    tl.store(at, d_dt.to(d_raw.dtype.element_ty), mask=inside)
    part = (b * chunks + c) * heads + h
    tl.store(d_A + part, tl.sum(d_a * dt, 0), mask=h < heads)
    tl.store(d_bias + part, tl.sum(d_dt, 0), mask=h < heads)
