"""What the programs of the Triton convolution are made of (causal_conv.py): functions inside kernels.

C is the number of channels of a program's block. Rows are [C] in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def row(base, t, step, columns, inside, first, end):
    """Row t of a [tokens, channels] matrix in fp32, [C]; zeros if t is not in [first, end)."""
    at = base + t.to(tl.int64) * step + columns
    return tl.load(at, mask=inside & (t >= first) & (t < end), other=0.0).to(tl.float32)


@triton.jit
def rows(base, t, step, columns, inside, first, end):
    """Rows t to t + 3, four times [C]."""
    a0 = row(base, t, step, columns, inside, first, end)
    a1 = row(base, t + 1, step, columns, inside, first, end)
    a2 = row(base, t + 2, step, columns, inside, first, end)
    a3 = row(base, t + 3, step, columns, inside, first, end)
    return a0, a1, a2, a3


@triton.jit
def write(base, t, step, columns, inside, end, rows):
    """Writes rows t to t + 3, four times [C], of which those from ``end`` on do not exist."""
    for i in tl.static_range(4):
        at = base + (t + i).to(tl.int64) * step + columns
        tl.store(at, rows[i].to(base.dtype.element_ty), mask=inside & (t + i < end))


@triton.jit
def row_before(initial, t, columns, inside, WIDTH: tl.constexpr):
    """Row t < 0 of the inputs before the first token, initial [channels, w - 1]; zeros for other t, [C]."""
    known = (t < 0) & (t > -WIDTH)
    return tl.load(initial + columns * (WIDTH - 1) + (WIDTH - 1 + t), mask=inside & known, other=0.0).to(tl.float32)


@triton.jit
def joined(documents, t, end, DOCUMENTS: tl.constexpr):
    """Whether token t is in the document of token t - 1; true before the first and after the last token."""
    if DOCUMENTS:
        known = (t > 0) & (t < end)
        return tl.load(documents + t, mask=known, other=0) == tl.load(documents + t - 1, mask=known, other=0)
    else:
        return t == t


@triton.jit
def all_joined(documents, t, end, DOCUMENTS: tl.constexpr):
    """joined of tokens t to t + 3."""
    j0 = joined(documents, t, end, DOCUMENTS)
    j1 = joined(documents, t + 1, end, DOCUMENTS)
    j2 = joined(documents, t + 2, end, DOCUMENTS)
    j3 = joined(documents, t + 3, end, DOCUMENTS)
    return j0, j1, j2, j3


@triton.jit
def only(condition, value, DOCUMENTS: tl.constexpr):
    if DOCUMENTS:
        return tl.where(condition, value, 0.0)
    else:
        return value


@triton.jit
def taps(w, r0, r1, r2, r3, j1, j2, j3, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Sum of w_k r_k, [C], where r_k is a row k steps away and j_k says whether no document ends on step k."""
    total = w[1] * r1
    if WIDTH > 2:
        further = w[2] * r2
        if WIDTH > 3:
            further += only(j3, w[3] * r3, DOCUMENTS)
        total += only(j2, further, DOCUMENTS)
    return w[0] * r0 + only(j1, total, DOCUMENTS)


@triton.jit
def four_taps(w, a, p, j, i, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """taps of the rows a, four times [C], each a step after the one before it; three rows p precede, the last first.

    j and i say of each row of a, and of the first two of p, whether its token is in the document of the one before it.
    """
    y0 = taps(w, a[0], p[0], p[1], p[2], j[0], i[0], i[1], WIDTH, DOCUMENTS)
    y1 = taps(w, a[1], a[0], p[0], p[1], j[1], j[0], i[0], WIDTH, DOCUMENTS)
    y2 = taps(w, a[2], a[1], a[0], p[0], j[2], j[1], j[0], WIDTH, DOCUMENTS)
    y3 = taps(w, a[3], a[2], a[1], a[0], j[3], j[2], j[1], WIDTH, DOCUMENTS)
    return y0, y1, y2, y3


@triton.jit
def weights(weight, bias, columns, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """Taps of 0, 1, 2 and 3 steps back, [C] each, zeros for those that are not; and the bias, [C]."""
    tap = tl.arange(0, 4)[None, :] - (4 - WIDTH)  # [1, 4]
    at = weight + columns[:, None] * WIDTH + tap
    taps = tl.load(at, mask=inside[:, None] & (tap >= 0), other=0.0).to(tl.float32)  # [C, 4]
    even, odd = tl.split(tl.reshape(taps, (CHANNELS, 2, 2)))  # [C, 2]: taps 3, 1 and taps 2, 0
    w3, w1 = tl.split(even)
    w2, w0 = tl.split(odd)
    b = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return (w0, w1, w2, w3), b


@triton.jit
def silu(y, SILU: tl.constexpr):
    if SILU:
        return y / (1.0 + tl.exp(-y))
    else:
        return y


@triton.jit
def silu_gradient(dy, y, SILU: tl.constexpr):
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-y))
        return dy * sigmoid * (1.0 + y * (1.0 - sigmoid))
    else:
        return dy


@triton.jit
def add_weight_gradients(d, g, r0, r1, r2, r3, j1, j2, j3, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """What a token's gradient g [C] gives to the gradients of the taps, added to d; arguments as for taps."""
    d0, d1, d2, d3 = d
    d0 += g * r0
    d1 += only(j1, g * r1, DOCUMENTS)
    if WIDTH > 2:
        d2 += only(j1 & j2, g * r2, DOCUMENTS)
    if WIDTH > 3:
        d3 += only(j1 & j2 & j3, g * r3, DOCUMENTS)
    return d0, d1, d2, d3


@triton.jit
def gradients_of_sums(
    dy,
    t,
    step,
    columns,
    inside,
    end,
    w,
    b,
    a,
    p,
    j,
    i,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Gradients before the activation of tokens t to t + 3, four times [C], zeros from ``end`` on; a to i as above."""
    g = rows(dy, t, step, columns, inside, 0, end)
    y = four_taps(w, a, p, j, i, WIDTH, DOCUMENTS)
    g0, g1 = silu_gradient(g[0], b + y[0], SILU), silu_gradient(g[1], b + y[1], SILU)
    g2, g3 = silu_gradient(g[2], b + y[2], SILU), silu_gradient(g[3], b + y[3], SILU)
    return g0, g1, g2, g3


@triton.jit
def write_sums(sums, channels, columns, inside, d):
    """Writes five rows [C] of a program to its share [5, channels] of the sums."""
    for i in tl.static_range(5):
        tl.store(sums + i * channels + columns, d[i], mask=inside)


@triton.jit
def write_initial(d_initial, columns, inside, w, g, m, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Gradients of the w - 1 inputs before the first token, [channels, w - 1]: rows -1, -2 and -3 of dx.

    g has the gradients before the activation of tokens 0 to 2, m says whether each is joined to the one before it.
    """
    zero = tl.zeros_like(g[0])
    at = d_initial + columns * (WIDTH - 1) + (WIDTH - 1)
    tl.store(at - 1, taps(w, zero, g[0], g[1], g[2], m[0], m[1], m[2], WIDTH, DOCUMENTS), mask=inside)
    if WIDTH > 2:
        tl.store(at - 2, taps(w, zero, zero, g[0], g[1], m[0], m[0], m[1], WIDTH, DOCUMENTS), mask=inside)
    if WIDTH > 3:
        tl.store(at - 3, taps(w, zero, zero, zero, g[0], m[0], m[0], m[0], WIDTH, DOCUMENTS), mask=inside)
