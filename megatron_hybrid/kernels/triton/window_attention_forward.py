"""The forward kernel of :mod:`window_attention`, and what all its kernels share: ranges of keys, scores, masks.

A program has ``BLOCK_M`` rows: ``ROWS`` queries of each of ``PACK`` query heads that read the same keys, so that a
block of keys serves them all. Keys and values are read through descriptors [b, heads, s, width] of any strides, and
what stands on the left of a product in every pass of a loop by pointers (:func:`read_heads`). A width that is
no power of two is read in two parts, of ``D0`` and ``D1`` channels for Q and K, ``E0`` and ``E1`` for V; what stands
behind the tensor's width reads as zero. Positions are those of keys; query row r has position offset + r.
"""

import triton
import triton.language as tl

SHAPE = (
    "sq", "offset", "length", "window", "sinks", "heads", "groups", "row_stride",
    "q_b", "q_h", "q_s", "o_b", "o_h", "o_s", "do_b", "do_h", "do_s",
)  # fmt: skip
"""Arguments whose values make no kernel of their own."""


@triton.jit
def read(x0, x1, b, h, r, HEADS: tl.constexpr, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Rows r.. of heads h..: both parts, [HEADS x ROWS, W0] and [HEADS x ROWS, W1]; the first twice if W1 is 0."""
    part0 = x0.load([b, h, r, 0]).reshape(HEADS * ROWS, W0)
    part1 = part0
    if W1 > 0:
        part1 = x1.load([b, h, r, W0]).reshape(HEADS * ROWS, W1)
    return part0, part1


@triton.jit
def read_heads(
    x, stride_b, stride_h, stride_s, b, h, r, rows,
    PACK: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """What :func:`read` gives, of rows r.. below ``rows`` of ``PACK`` heads of a tensor of width W, by its strides.

    A block of several heads that a descriptor loads stands in registers, since Triton 3.6 keeps no reshaped block in
    shared memory; one loaded by pointers stands in shared memory when it is the left side of a product. That matters:
    ptxas 12.8 and 12.9 may give a left side that a loop keeps in registers the same registers as one that the loop
    computes. From the second pass on the scores then came from weights instead of Q, at widths of 64 in blocks of 64
    keys (tests/support/machine_code.py finds such products).
    """
    row = tl.arange(0, PACK * ROWS)
    s = r + row % ROWS
    at = x + b.to(tl.int64) * stride_b + (h + row // ROWS).to(tl.int64) * stride_h + s.to(tl.int64) * stride_s
    at = tl.multiple_of(at, 16)[:, None]  # bytes (kernels/alignment.py): eight channels are read at once
    inside = (s < rows)[:, None]
    column = tl.arange(0, W0)[None, :]
    part0 = tl.load(at + column, mask=inside & (column < W), other=0.0)
    part1 = part0
    if W1 > 0:
        column1 = W0 + tl.arange(0, W1)[None, :]
        part1 = tl.load(at + column1, mask=inside & (column1 < W), other=0.0)
    return part0, part1


@triton.jit
def products(a0, a1, b0, b1, SECOND: tl.constexpr):
    """a b^T over both parts, [rows of a, rows of b] fp32."""
    c = tl.dot(a0, b0.T)
    if SECOND:
        c = tl.dot(a1, b1.T, c)
    return c


@triton.jit
def start_of(starts, position, DOCUMENTS: tl.constexpr):
    """First position of the document at ``position``."""
    if DOCUMENTS:
        return tl.load(starts + position)
    return 0


@triton.jit
def key_range(first, i0, window, sinks, WINDOW: tl.constexpr, SINKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the keys of queries i0.. begin: (first key of the window's range, blocks of sinks before that range).

    Queries behind the first one's document have their sinks inside the range, so that only its sinks lie before it.
    """
    low = first
    blocks = 0
    if WINDOW:
        low = tl.maximum(first, i0 - window + 1)
        if SINKS:
            blocks = tl.cdiv(sinks, BLOCK_N)
            if low - first <= sinks:  # the two ranges touch
                low = first
                blocks = 0
    return low, blocks


@triton.jit
def key_block(n, sink_blocks, first, low, sinks, i1, SINKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block n of a program's keys: (first key, end of the range that it belongs to)."""
    j0 = low + (n - sink_blocks) * BLOCK_N
    end = i1
    if SINKS:  # noqa: SIM102 - one is known when the kernel is compiled
        if n < sink_blocks:
            j0 = first + n * BLOCK_N
            end = first + sinks
    return j0, end


@triton.jit
def all_visible(
    j0, end, n, sink_blocks, i0, i1, last, window, WINDOW: tl.constexpr, SINKS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether queries i0..i1-1, the last of which has its document's start at ``last``, see keys j0..j0+BLOCK_N-1."""
    full = (j0 + BLOCK_N <= tl.minimum(end, i0 + 1)) & (j0 >= last)
    if WINDOW:
        inside = j0 + window >= i1
        if SINKS:
            inside = inside | (n < sink_blocks)
        full = full & inside
    return full


@triton.jit
def visible(i, j, start, window, sinks, WINDOW: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The mask of queries i and keys j, one a column and one a row; ``start`` is that of the query's document.

    What depends on one of them alone stands alone on its side, so that it is computed once a row.
    """
    seen = j <= i
    if WINDOW:
        near = j > i - window
        if SINKS:
            near = near | (j < start + sinks)
        seen = seen & near
    if DOCUMENTS:
        seen = seen & (j >= start)
    return seen


@triton.jit(do_not_specialize=SHAPE)
def attention_forward(
    q, q_b, q_h, q_s, k0, k1, v0, v1, o0, o1, lse, starts,
    sq, offset, length, window, sinks, heads, groups, row_stride, score_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output [b, h, sq, dv], and log2 of the sum of the exponentials, fp32, in rows [b, h] of ``row_stride``.

    ``score_scale`` is the scale of the scores times log2(e); ``groups`` query heads read the same keys; ``starts`` is
    [b, length] int32.
    """
    ROWS: tl.constexpr = BLOCK_M // PACK
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the last queries see most keys: they start first
    b = tl.program_id(1) // (heads // PACK)
    h = tl.program_id(1) % (heads // PACK) * PACK
    hk = h // groups
    i0 = offset + r0
    i1 = tl.minimum(i0 + ROWS, offset + sq)
    r = tl.arange(0, BLOCK_M) % ROWS
    i = i0 + r  # position of each row
    starts += b.to(tl.int64) * length
    first = start_of(starts, i0, DOCUMENTS)
    last = start_of(starts, i1 - 1, DOCUMENTS)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + i, mask=i < i1, other=0)[:, None]

    qa, qb = read_heads(q, q_b, q_h, q_s, b, h, r0, sq, PACK, ROWS, D, D0, D1)
    low, sink_blocks = key_range(first, i0, window, sinks, WINDOW, SINKS, BLOCK_N)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, E0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, E1 if E1 > 0 else 16], tl.float32)
    for n in tl.range(0, sink_blocks + tl.cdiv(i1 - low, BLOCK_N)):
        j0, end = key_block(n, sink_blocks, first, low, sinks, i1, SINKS, BLOCK_N)
        ka, kb = read(k0, k1, b, hk, j0, 1, BLOCK_N, D0, D1)
        s = products(qa, qb, ka, kb, D1 > 0)
        if not all_visible(j0, end, n, sink_blocks, i0, i1, last, window, WINDOW, SINKS, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)[None, :]
            seen = visible(tl.minimum(i, end - 1)[:, None], j, start, window, sinks, WINDOW, SINKS, DOCUMENTS)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1) * score_scale)
        p = tl.math.exp2(s * score_scale - higher[:, None])
        shrink = tl.math.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        highest = higher
        va, vb = read(v0, v1, b, hk, j0, 1, BLOCK_N, E0, E1)
        p = p.to(va.dtype)
        acc0 = tl.dot(p, va, acc0 * shrink[:, None])
        if E1 > 0:
            acc1 = tl.dot(p, vb, acc1 * shrink[:, None])

    total = tl.where(i < i1, total, 1.0)  # rows behind the last query may see nothing
    o0.store([b, h, r0, 0], (acc0 / total[:, None]).to(o0.dtype).reshape(1, PACK, ROWS, E0))
    if E1 > 0:
        o1.store([b, h, r0, E0], (acc1 / total[:, None]).to(o1.dtype).reshape(1, PACK, ROWS, E1))
    head = h + tl.arange(0, BLOCK_M) // ROWS
    rows = (b.to(tl.int64) * heads + head) * row_stride + r0 + r
    tl.store(lse + rows, highest + tl.math.log2(total), mask=r0 + r < sq)
