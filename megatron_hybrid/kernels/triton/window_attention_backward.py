"""The backward kernels of :mod:`window_attention`. No atomics: each gradient is added up in one program.

Scores and weights are computed again, once for the gradient of Q and once for those of K and V.

Sinks are seen by all later queries of their document, which would make the programs of their keys many times longer
than the others. So the queries are cut into chunks of ``CHUNK``. A query that sees a sink outside its window, and whose
chunk begins behind its document's start, adds to that chunk's partial sum (``attention_sink_gradients``); all other
pairs of queries and keys belong to the program of the keys (``attention_key_value_gradients``), which then adds the
partial sums in order. A chunk that begins behind the start of a document begins inside it, so that a chunk has the
sinks of one document only.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton.window_attention_forward import (
    SHAPE,
    all_visible,
    key_block,
    key_range,
    products,
    read,
    read_heads,
    start_of,
    visible,
)


@triton.jit(do_not_specialize=SHAPE)
def attention_query_gradients(
    q, q_b, q_h, q_s, o, o_b, o_h, o_s, do, do_b, do_h, do_s, k0, k1, v0, v1, dq0, dq1, lse, delta, starts,
    sq, offset, length, window, sinks, heads, groups, row_stride, scale, score_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of Q, and delta: the sum over channels of output times its gradient, stored as ``lse`` is."""
    ROWS: tl.constexpr = BLOCK_M // PACK
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    b = tl.program_id(1) // (heads // PACK)
    h = tl.program_id(1) % (heads // PACK) * PACK
    hk = h // groups
    i0 = offset + r0
    i1 = tl.minimum(i0 + ROWS, offset + sq)
    r = tl.arange(0, BLOCK_M) % ROWS
    i = i0 + r
    starts += b.to(tl.int64) * length
    first = start_of(starts, i0, DOCUMENTS)
    last = start_of(starts, i1 - 1, DOCUMENTS)
    start = 0
    if DOCUMENTS:
        start = tl.load(starts + i, mask=i < i1, other=0)[:, None]

    rows = (b.to(tl.int64) * heads + h + tl.arange(0, BLOCK_M) // ROWS) * row_stride + r0 + r
    norm = tl.load(lse + rows, mask=r0 + r < sq, other=0.0)
    doa, dob = read_heads(do, do_b, do_h, do_s, b, h, r0, sq, PACK, ROWS, E, E0, E1)
    oa, ob = read_heads(o, o_b, o_h, o_s, b, h, r0, sq, PACK, ROWS, E, E0, E1)
    d = tl.sum(oa.to(tl.float32) * doa.to(tl.float32), 1)
    if E1 > 0:
        d += tl.sum(ob.to(tl.float32) * dob.to(tl.float32), 1)
    tl.store(delta + rows, d, mask=r0 + r < sq)

    qa, qb = read_heads(q, q_b, q_h, q_s, b, h, r0, sq, PACK, ROWS, D, D0, D1)
    low, sink_blocks = key_range(first, i0, window, sinks, WINDOW, SINKS, BLOCK_N)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], tl.float32)
    for n in tl.range(0, sink_blocks + tl.cdiv(i1 - low, BLOCK_N)):
        j0, end = key_block(n, sink_blocks, first, low, sinks, i1, SINKS, BLOCK_N)
        ka, kb = read(k0, k1, b, hk, j0, 1, BLOCK_N, D0, D1)
        va, vb = read(v0, v1, b, hk, j0, 1, BLOCK_N, E0, E1)
        s = products(qa, qb, ka, kb, D1 > 0)
        dp = products(doa, dob, va, vb, E1 > 0)
        if not all_visible(j0, end, n, sink_blocks, i0, i1, last, window, WINDOW, SINKS, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)[None, :]
            seen = visible(tl.minimum(i, end - 1)[:, None], j, start, window, sinks, WINDOW, SINKS, DOCUMENTS)
            s = tl.where(seen, s, float("-inf"))
        p = tl.math.exp2(s * score_scale - norm[:, None])
        ds = (p * (dp - d[:, None])).to(ka.dtype)
        acc0 = tl.dot(ds, ka, acc0)
        if D1 > 0:
            acc1 = tl.dot(ds, kb, acc1)

    dq0.store([b, h, r0, 0], (acc0 * scale).to(dq0.dtype).reshape(1, PACK, ROWS, D0))
    if D1 > 0:
        dq1.store([b, h, r0, D0], (acc1 * scale).to(dq1.dtype).reshape(1, PACK, ROWS, D1))


@triton.jit
def rows_of_keys(
    ka, kb, va, vb, q0, q1, do0, do1, lse, delta, starts,
    b, h, j0, i_low, i_high, one_document, first, sq, offset, window, sinks, heads, groups, score_scale,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr, PARTIAL: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys j0.. and their values by queries i_low..i_high-1 of heads h..h+groups-1.

    Behind the last query all that is read is zero, and so is what it adds.

    Queries before ``one_document`` belong to the document of key j0. PARTIAL: only those pairs that see each other
    because the key is a sink, of the document that begins at ``first``; otherwise only those that are not left to such
    partial sums.
    """
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 16], tl.float32)
    dv0 = tl.zeros([BLOCK_N, E0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, E1 if E1 > 0 else 16], tl.float32)
    j = j0 + tl.arange(0, BLOCK_N)[:, None]
    low = (i_low - offset) // 4 * 4  # rows of fp32 begin at multiples of 16 bytes
    blocks = tl.cdiv(tl.maximum(i_high - offset - low, 0), BLOCK_M)
    for n in tl.range(0, groups * blocks):
        head = h + n // blocks
        r0 = low + n % blocks * BLOCK_M
        i0 = offset + r0
        qa, qb = read(q0, q1, b, head, r0, 1, BLOCK_M, D0, D1)
        doa, dob = read(do0, do1, b, head, r0, 1, BLOCK_M, E0, E1)
        norm = lse.load([b, head, r0]).reshape(1, BLOCK_M)
        d = delta.load([b, head, r0]).reshape(1, BLOCK_M)
        s = products(ka, kb, qa, qb, D1 > 0)
        dp = products(va, vb, doa, dob, E1 > 0)
        if PARTIAL:
            full = (i0 - (j0 + BLOCK_N - 1) >= window) & (j0 + BLOCK_N <= first + sinks)
            full = full & (i0 >= i_low) & (i0 + BLOCK_M <= i_high)
        else:
            full = (i0 >= j0 + BLOCK_N - 1) & (i0 + BLOCK_M <= one_document)
            if WINDOW:
                full = full & (i0 + BLOCK_M - 1 - j0 < window)
        if not full:
            i = (i0 + tl.arange(0, BLOCK_M))[None, :]
            if PARTIAL:
                seen = (j <= i - window) & (j < first + sinks) & (i >= i_low) & (i < i_high)
            else:
                start = 0
                if DOCUMENTS:
                    start = tl.load(starts + i, mask=i < offset + sq, other=0)
                # queries that leave their sinks to a partial sum see none here
                own = tl.where(start >= i // CHUNK * CHUNK, sinks, 0)
                seen = visible(i, j, start, window, own, WINDOW, SINKS, DOCUMENTS)
            s = tl.where(seen, s, float("-inf"))
        p = tl.math.exp2(s * score_scale - norm)
        weights = p.to(doa.dtype)
        dv0 = tl.dot(weights, doa, dv0)
        if E1 > 0:
            dv1 = tl.dot(weights, dob, dv1)
        ds = (p * (dp - d)).to(qa.dtype)
        dk0 = tl.dot(ds, qa, dk0)
        if D1 > 0:
            dk1 = tl.dot(ds, qb, dk1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=SHAPE)
def attention_sink_gradients(
    q0, q1, k0, k1, v0, v1, do0, do1, pk0, pk1, pv0, pv1, lse, delta, starts, ends,
    sq, offset, length, window, sinks, heads, groups, score_scale,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums [b x hk x chunks, blocks of sinks x BLOCK_N, D0 + D1 + E0 + E1] fp32 of the sinks' gradients.

    Row i is that of the i-th key of the document that the chunk begins in.
    """
    chunk = tl.program_id(0)
    hk = tl.program_id(2) % (heads // groups)
    b = tl.program_id(2) // (heads // groups)
    starts += b.to(tl.int64) * length
    ends += b.to(tl.int64) * length
    begin = chunk * CHUNK
    first = start_of(starts, begin, DOCUMENTS)
    end = tl.minimum(begin + CHUNK, offset + sq)
    if DOCUMENTS:
        end = tl.minimum(end, tl.load(ends + begin))
    if first == begin:
        end = 0  # a chunk that begins with a document: its sums are zero
    j0 = first + tl.program_id(1) * BLOCK_N
    ka, kb = read(k0, k1, b, hk, j0, 1, BLOCK_N, D0, D1)
    va, vb = read(v0, v1, b, hk, j0, 1, BLOCK_N, E0, E1)
    i_low = tl.maximum(tl.maximum(begin, offset), j0 + window)
    dk0, dk1, dv0, dv1 = rows_of_keys(
        ka, kb, va, vb, q0, q1, do0, do1, lse, delta, starts,
        b, hk * groups, j0, i_low, end, 0, first, sq, offset, window, sinks, heads, groups, score_scale,
        D0, D1, E0, E1, True, True, DOCUMENTS, True, CHUNK, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    z = tl.program_id(2) * tl.num_programs(0) + chunk
    row = tl.program_id(1) * BLOCK_N
    pk0.store([z, row, 0], dk0.reshape(1, BLOCK_N, D0))
    pv0.store([z, row, D0 + D1], dv0.reshape(1, BLOCK_N, E0))
    if D1 > 0:
        pk1.store([z, row, D0], dk1.reshape(1, BLOCK_N, D1))
    if E1 > 0:
        pv1.store([z, row, D0 + D1 + E0], dv1.reshape(1, BLOCK_N, E1))


@triton.jit(do_not_specialize=SHAPE)
def attention_key_value_gradients(
    q0, q1, k0, k1, v0, v1, do0, do1, dk0, dk1, dv0, dv1, pk0, pk1, pv0, pv1, lse, delta, starts, ends,
    sq, offset, length, window, sinks, heads, groups, scale, score_scale,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of K and V, to which the partial sums of :func:`attention_sink_gradients` are added."""
    j0 = tl.program_id(0) * BLOCK_N
    hk = tl.program_id(1) % (heads // groups)
    b = tl.program_id(1) // (heads // groups)
    starts += b.to(tl.int64) * length
    ends += b.to(tl.int64) * length
    sk = offset + sq
    final = tl.minimum(j0 + BLOCK_N, sk) - 1  # last key
    first = start_of(starts, j0, DOCUMENTS)
    last = start_of(starts, final, DOCUMENTS)
    i_high = sk
    one_document = 2147483647
    if DOCUMENTS:
        one_document = tl.load(ends + j0)
        i_high = tl.minimum(tl.load(ends + final), sk)
    beyond = i_high  # behind the last query of the last key's document
    if WINDOW:
        near = final + window
        if SINKS:  # noqa: SIM102 - one is known when the kernel is compiled
            if last + sinks > j0:
                near = tl.maximum(near, last // CHUNK * CHUNK + CHUNK)
        i_high = tl.minimum(i_high, near)
    ka, kb = read(k0, k1, b, hk, j0, 1, BLOCK_N, D0, D1)
    va, vb = read(v0, v1, b, hk, j0, 1, BLOCK_N, E0, E1)
    a0, a1, c0, c1 = rows_of_keys(
        ka, kb, va, vb, q0, q1, do0, do1, lse, delta, starts,
        b, hk * groups, j0, tl.maximum(j0, offset), i_high, one_document, first,
        sq, offset, window, sinks, heads, groups, score_scale,
        D0, D1, E0, E1, WINDOW, SINKS, DOCUMENTS, False, CHUNK, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SINKS:  # noqa: SIM102
        if (last + sinks > j0) | (first + sinks > j0):
            chunks = tl.cdiv(sk, CHUNK)
            for chunk in tl.range(tl.maximum(first // CHUNK + 1, offset // CHUNK), tl.cdiv(beyond, CHUNK)):
                z = tl.program_id(1) * chunks + chunk
                # rows before and behind the sinks of the chunk's document read as zero
                row = j0 - start_of(starts, chunk * CHUNK, DOCUMENTS)
                a0 += pk0.load([z, row, 0]).reshape(BLOCK_N, D0)
                c0 += pv0.load([z, row, D0 + D1]).reshape(BLOCK_N, E0)
                if D1 > 0:
                    a1 += pk1.load([z, row, D0]).reshape(BLOCK_N, D1)
                if E1 > 0:
                    c1 += pv1.load([z, row, D0 + D1 + E0]).reshape(BLOCK_N, E1)
    dk0.store([b, hk, j0, 0], (a0 * scale).to(dk0.dtype).reshape(1, 1, BLOCK_N, D0))
    dv0.store([b, hk, j0, 0], c0.to(dv0.dtype).reshape(1, 1, BLOCK_N, E0))
    if D1 > 0:
        dk1.store([b, hk, j0, D0], (a1 * scale).to(dk1.dtype).reshape(1, 1, BLOCK_N, D1))
    if E1 > 0:
        dv1.store([b, hk, j0, E0], c1.to(dv1.dtype).reshape(1, 1, BLOCK_N, E1))
