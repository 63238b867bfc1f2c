"""The two walks of the Mamba-2 scan along the sequence, the state or its gradient in registers.

    forward     S_(c+1) = decay_c S_c + sum_j w_j B_j x_j^T                    w_j = dt_j exp(sum_last - sum_j)
    backward    dS_(c-1) = decay_c dS_c + sum_i exp(sum_i) C_i dy_i^T

with decay_c = exp(sum_last) of chunk c, S_c the state at its start and dS_c the gradient of the state at its end. One
program for a block of a head's channels and a segment of the sequence: ``ssd_scan.py`` cuts it into segments where
there are too few heads, and has the shape letters. A walk that also computes the chunk's output, so that no state is
written, was slower on an H200: its products wait for one another.
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
    x, B, steps, sums, documents, first, states, last,
    x_b, x_s, maps_b, maps_s, length, heads, chunks, batch, SEGMENT,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr, STORES: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, WHOLE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [b, s, h p], B [b, s, g n]; first and last are [segments, b, h, p, n] fp32.

    STORES: states [b, c, h, n, p] gets the state at each chunk's start.
    """
    x_s, maps_s = x_s * ALIGNED, maps_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    b = (tl.program_id(0) // (heads * BLOCKS)).to(tl.int64)
    head = (tl.program_id(0) % (heads * BLOCKS) // BLOCKS).to(tl.int64)
    p0 = tl.program_id(0) % BLOCKS * CHANNELS
    segment = tl.program_id(1)
    width = HEAD_DIM - p0
    p, n, i = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, CHUNK)
    tokens = tl.full((), CHUNK, tl.int64)
    place = (((segment * batch + b) * heads + head) * HEAD_DIM + p0) * STATE
    state = tl.zeros((STATES, CHANNELS), tl.float32)
    if HAS_FIRST:
        state += tl.trans(load_tile(first + place, STATE, p, n, width, STATE, ALL_P, ALL_N))
    x += b * x_b * ALIGNED + head * HEAD_DIM + p0
    B += b * maps_b * ALIGNED + head // GROUP * STATE
    documents += b * length
    steps += (b * heads + head) * (chunks * CHUNK)
    sums += (b * heads + head) * (chunks * CHUNK)
    states += (b * chunks * heads + head) * (HEAD_DIM * STATE) + p0
    for c in tl.range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, chunks), num_stages=STAGES):
        start = c * tokens
        left = length - c * CHUNK
        x_tile = load_tile(x + start * x_s, x_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        B_tile = load_tile(B + start * maps_s, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
        sum_t, sum_last = tl.load(sums + start + i), tl.load(sums + start + CHUNK - 1)
        weight, decay = tl.load(steps + start + i) * tl.exp(sum_last - sum_t), tl.exp(sum_last)
        if HAS_DOCUMENTS:
            before, end = chunk_documents(documents, c, length, CHUNK)
            mine = tl.load(documents + start + i, mask=i < left, other=-1)
            weight = tl.where(mine == end, weight, 0.0)
            decay = tl.where(before == end, decay, 0.0)
        if STORES:
            at = states + start // CHUNK * heads * (HEAD_DIM * STATE)
            store_tile(at, HEAD_DIM, n, p, STATE, width, state, ALL_N, ALL_P)
        v = (x_tile.to(tl.float32) * weight[:, None]).to(DTYPE)  # [CHUNK, CHANNELS]
        state = tl.dot(tl.trans(B_tile), v, state * decay, input_precision=PRECISION)
    if HAS_LAST:
        store_tile(last + place, STATE, p, n, width, STATE, tl.trans(state), ALL_P, ALL_N)


@triton.jit
def state_gradients_kernel(
    d_y, C, sums, documents, first, states, d_states, last, overlaps,
    d_y_b, d_y_s, maps_b, maps_s, length, heads, chunks, batch, SEGMENT,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr, STORES: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, WHOLE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """From the end back; first, last and d_states as in the forward walk, d_states at each chunk's end.

    STORES: overlaps [b, c, h p] gets decay S . dS of each chunk, for which states are read.
    """
    d_y_s, maps_s = d_y_s * ALIGNED, maps_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    b = (tl.program_id(0) // (heads * BLOCKS)).to(tl.int64)
    head = (tl.program_id(0) % (heads * BLOCKS) // BLOCKS).to(tl.int64)
    p0 = tl.program_id(0) % BLOCKS * CHANNELS
    segment = tl.program_id(1)
    width = HEAD_DIM - p0
    p, n, i = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, CHUNK)
    tokens = tl.full((), CHUNK, tl.int64)
    place = (((segment * batch + b) * heads + head) * HEAD_DIM + p0) * STATE
    state = tl.zeros((STATES, CHANNELS), tl.float32)
    if HAS_FIRST:
        state += tl.trans(load_tile(first + place, STATE, p, n, width, STATE, ALL_P, ALL_N))
    d_y += b * d_y_b * ALIGNED + head * HEAD_DIM + p0
    C += b * maps_b * ALIGNED + head // GROUP * STATE
    documents += b * length
    sums += (b * heads + head) * (chunks * CHUNK)
    states += (b * chunks * heads + head) * (HEAD_DIM * STATE) + p0
    d_states += (b * chunks * heads + head) * (HEAD_DIM * STATE) + p0
    overlaps += b * chunks * heads * HEAD_DIM + head * HEAD_DIM + p0
    end_of_segment = tl.minimum((segment + 1) * SEGMENT, chunks)
    for k in tl.range(segment * SEGMENT, end_of_segment, num_stages=STAGES):
        c = end_of_segment - 1 - (k - segment * SEGMENT)
        start = c * tokens
        left = length - c * CHUNK
        d_tile = load_tile(d_y + start * d_y_s, d_y_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        C_tile = load_tile(C + start * maps_s, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
        into, decay = tl.exp(tl.load(sums + start + i)), tl.exp(tl.load(sums + start + CHUNK - 1))
        if HAS_DOCUMENTS:
            before, end = chunk_documents(documents, c, length, CHUNK)
            mine = tl.load(documents + start + i, mask=i < left, other=-1)
            into = tl.where(mine == before, into, 0.0)
            decay = tl.where(before == end, decay, 0.0)
        at = start // CHUNK * heads * (HEAD_DIM * STATE)
        if STORES:
            store_tile(d_states + at, HEAD_DIM, n, p, STATE, width, state, ALL_N, ALL_P)
        state *= decay
        if STORES:
            other = load_tile(states + at, HEAD_DIM, n, p, STATE, width, ALL_N, ALL_P)
            overlap = tl.sum(state * other.to(tl.float32), 0)
            tl.store(overlaps + start // CHUNK * heads * HEAD_DIM + p, overlap, mask=p < width)
        v = (d_tile.to(tl.float32) * into[:, None]).to(DTYPE)  # [CHUNK, CHANNELS]
        state = tl.dot(tl.trans(C_tile), v, state, input_precision=PRECISION)
    if HAS_LAST:
        store_tile(last + place, STATE, p, n, width, STATE, tl.trans(state), ALL_P, ALL_N)
