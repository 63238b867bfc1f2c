"""The state of the Mamba-2 scan at the start of each chunk, and its gradient at the end of each chunk.

    forward    S_(c+1) = decay_c S_c + sum_j w_j x_j B_j^T         w_j = dt_j exp(sum_last - sum_j)
    backward  dS_(c-1) = decay_c dS_c + sum_i w_i dy_i C_i^T       w_i = exp(sum_i)

with decay_c = exp(sum_last). The only kernel that walks along the sequence: one program for each
block of a head's channels, the state in registers. ``ssd_scan.py`` has the shape letters.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton.tiles import load_tile, store_tile


@triton.jit
def chunk_documents(documents, chunk, length, CHUNK: tl.constexpr):
    """The document of the last token before a chunk (of the first, of its own) and of its last token."""
    before = tl.maximum(chunk * CHUNK - 1, 0)
    last = tl.minimum(chunk * CHUNK + CHUNK, length) - 1
    return tl.load(documents + before), tl.load(documents + last)


@triton.jit
def gate(z):
    """silu(z) and its derivative."""
    s = tl.sigmoid(z)
    return z * s, s * (1.0 + z * (1.0 - s))


@triton.jit
def states_kernel(
    values, maps, steps, sums, documents, first, forward_states, states, last, overlaps,
    values_b, values_s, maps_b, maps_s, length, heads, chunks,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, WHOLE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Forward: values x, maps B, from ``first`` on. Backward: values dy, maps C, from the end back.

    states [b, c, h, n, p] gets the state before the walk enters each chunk; first and last are [b, h, p, n] fp32. The
    backward walk also reads the forward walk's states, and leaves decay S . dS of each chunk in overlaps [b, c, h p].
    """
    values_s, maps_s = values_s * ALIGNED, maps_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    b = tl.program_id(0) // (heads * BLOCKS)
    head = tl.program_id(0) % (heads * BLOCKS) // BLOCKS
    p0 = tl.program_id(0) % BLOCKS * CHANNELS
    width = HEAD_DIM - p0
    p, n, i = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, CHUNK)
    b, head = b.to(tl.int64), head.to(tl.int64)
    place = ((b * heads + head) * HEAD_DIM + p0) * STATE
    state = tl.zeros((STATES, CHANNELS), tl.float32)
    if HAS_FIRST:
        state += tl.trans(load_tile(first + place, STATE, p, n, width, STATE, ALL_P, ALL_N))
    values += b * values_b * ALIGNED + head * HEAD_DIM + p0
    maps += b * maps_b * ALIGNED + head // GROUP * STATE
    documents += b * length
    steps += (b * heads + head) * (chunks * CHUNK)
    sums += (b * heads + head) * (chunks * CHUNK)
    states += (b * chunks * heads + head) * (HEAD_DIM * STATE) + p0
    forward_states += (b * chunks * heads + head) * (HEAD_DIM * STATE) + p0
    overlaps += b * chunks * heads * HEAD_DIM + head * HEAD_DIM + p0
    for k in range(chunks):
        c = chunks - 1 - k if BACKWARD else k
        start = (c * CHUNK).to(tl.int64)
        left = length - c * CHUNK
        at = start // CHUNK * heads * (HEAD_DIM * STATE)
        store_tile(states + at, HEAD_DIM, n, p, STATE, width, state, ALL_N, ALL_P)
        v = load_tile(values + start * values_s, values_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        m = load_tile(maps + start * maps_s, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
        sum_t, sum_last = tl.load(sums + start + i), tl.load(sums + start + CHUNK - 1)
        weight = tl.exp(sum_t) if BACKWARD else tl.load(steps + start + i) * tl.exp(sum_last - sum_t)
        decay = tl.exp(sum_last)
        if HAS_DOCUMENTS:
            before, end = chunk_documents(documents, c, length, CHUNK)
            mine = tl.load(documents + start + i, mask=i < left, other=-1)
            weight = tl.where(mine == (before if BACKWARD else end), weight, 0.0)
            decay = tl.where(before == end, decay, 0.0)
        state *= decay
        if BACKWARD:
            other = load_tile(forward_states + at, HEAD_DIM, n, p, STATE, width, ALL_N, ALL_P)
            overlap = tl.sum(state * other.to(tl.float32), 0)
            tl.store(overlaps + start // CHUNK * heads * HEAD_DIM + p, overlap, mask=p < width)
        v = (v.to(tl.float32) * weight[:, None]).to(DTYPE)  # [CHUNK, CHANNELS]
        state = tl.dot(tl.trans(m), v, state, input_precision=PRECISION)
    if HAS_LAST:
        store_tile(last + place, STATE, p, n, width, STATE, tl.trans(state), ALL_P, ALL_N)
