"""The backward pass of the Mamba-2 scan inside each chunk: of the tokens as receivers i, and as senders j.

One program for a chunk and some heads of one group, whose dy ``scan_walks.py`` computes. With
E_ij = exp(sum_i - sum_j) for j <= i, H_ij = (dy_i . x_j) E_ij dt_j and W_ij = H_ij (C_i . B_j):

    receivers   dC_i = sum_j H_ij B_j + exp(sum_i) S^T dy_i                summed over the group's heads
                rows_t = sum_j W_tj - sum_i W_it + exp(sum_t) dy_t . S C_t
                steps_t = sum_i W_it / dt_t
    senders     dx_j = sum_i E_ij (C_i . B_j) dt_j dy_i + w_j dS B_j + D dy_j
                dB_j = sum_i H_ij C_i + w_j dS^T x_j                       summed over the group's heads
                columns_t = w_t / dt_t x_t . dS B_t                        w_j = dt_j exp(sum_last - sum_j)

S and dS are the state at the chunk's start and its gradient at the chunk's end. ``scan_steps.py`` makes the gradients
of dt and A from these. Two kernels, because the tiles of both do not fit into the registers of one. ``ssd_scan.py`` has
the shape letters.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton.scan_walks import chunk_documents
from megatron_hybrid.kernels.triton.tiles import load_tile, store_tile


@triton.jit
def receivers_kernel(
    x, B, C, d_y, steps, sums, documents, states, d_C, d_scores, d_steps, d_rows,
    x_b, x_s, maps_b, maps_s, d_y_b, d_y_s, length, heads, chunks, batch, SPLITS,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, WHOLE_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """d_C gets fp32 [SPLITS, b, c CHUNK, g n] and d_scores, the sum of H, [SPLITS, b, g, c, CHUNK, CHUNK].

    d_rows and d_steps are [v, b, h, c CHUNK] fp32, v being a block of a head's channels.
    """
    x_s, maps_s, d_y_s = x_s * ALIGNED, maps_s * ALIGNED, d_y_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    i, p, n = tl.arange(0, CHUNK), tl.arange(0, CHANNELS), tl.arange(0, STATES)
    start = (chunk * CHUNK).to(tl.int64)
    left = length - chunk * CHUNK
    x += b * x_b * ALIGNED + start * x_s
    d_y += b * d_y_b * ALIGNED + start * d_y_s
    in_group = b * maps_b * ALIGNED + start * maps_s + group * STATE
    B_tile = load_tile(B + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)  # [CHUNK, STATES]
    C_tile = load_tile(C + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
    scores = tl.dot(C_tile, tl.trans(B_tile), input_precision=PRECISION)  # [CHUNK, CHUNK]
    seen = i[:, None] >= i[None, :]
    if HAS_DOCUMENTS:
        documents += b * length
        before, _ = chunk_documents(documents, chunk, length, CHUNK)
        mine = tl.load(documents + start + i, mask=i < left, other=-1)
        seen = seen & (mine[:, None] == mine[None, :])
    summed = tl.zeros((CHUNK, CHUNK), tl.float32)
    d_C_tile = tl.zeros((CHUNK, STATES), tl.float32)
    for k in tl.range(split * GROUP // SPLITS * BLOCKS, (split + 1) * GROUP // SPLITS * BLOCKS, num_stages=STAGES):
        head = group * GROUP + k // BLOCKS
        p0 = k % BLOCKS * CHANNELS
        column, width = head * HEAD_DIM + p0, HEAD_DIM - p0
        own = (b * heads + head) * (chunks * CHUNK) + start
        dt, sum_t = tl.load(steps + own + i), tl.load(sums + own + i)
        into = tl.exp(sum_t)
        if HAS_DOCUMENTS:
            into = tl.where(mine == before, into, 0.0)
        at = ((b * chunks + chunk) * heads + head) * (HEAD_DIM * STATE) + p0
        state = load_tile(states + at, HEAD_DIM, n, p, STATE, width, ALL_N, ALL_P)  # [STATES, CHANNELS]
        x_tile = load_tile(x + column, x_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        d_tile = load_tile(d_y + column, d_y_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        y = tl.dot(C_tile, state, input_precision=PRECISION)  # of the state alone, [CHUNK, CHANNELS]
        from_state = tl.sum(d_tile.to(tl.float32) * y, 1) * into
        pairs = tl.dot(d_tile, tl.trans(x_tile), input_precision=PRECISION)  # [CHUNK, CHUNK]
        pairs *= tl.exp(tl.where(seen, sum_t[:, None] - sum_t[None, :], float("-inf")))  # H without dt
        summed += pairs * dt[None, :]
        pairs *= scores  # W without dt
        sum_columns = tl.sum(pairs, 0)
        at = ((k % BLOCKS * batch + b) * heads + head) * (chunks * CHUNK) + start + i
        tl.store(d_rows + at, tl.sum(pairs * dt[None, :], 1) + from_state - sum_columns * dt)
        tl.store(d_steps + at, sum_columns)
        weighted = (d_tile.to(tl.float32) * into[:, None]).to(DTYPE)
        d_C_tile = tl.dot(weighted, tl.trans(state), d_C_tile, input_precision=PRECISION)
    d_C_tile = tl.dot(summed.to(DTYPE), B_tile, d_C_tile, input_precision=PRECISION)
    row = heads // GROUP * STATE
    at = ((split * batch + b) * (chunks * CHUNK) + start) * row + group * STATE
    store_tile(d_C + at, row, i, n, CHUNK, STATE, d_C_tile, True, ALL_N)
    at = (((split * batch + b) * (heads // GROUP) + group) * chunks + chunk) * (CHUNK * CHUNK)
    store_tile(d_scores + at, CHUNK, i, i, CHUNK, CHUNK, summed, True, True)


@triton.jit
def senders_kernel(
    x, B, C, D, d_y, steps, sums, documents, d_states, d_scores, d_x, d_B, d_D, d_columns,
    x_b, x_s, maps_b, maps_s, d_y_b, d_y_s, d_x_b, d_x_s, length, heads, chunks, batch, SPLITS,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr, HAS_D: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, WHOLE_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """d_B is like d_C above, d_columns like d_rows and d_D [b, c, h p], all fp32."""
    x_s, maps_s, d_y_s, d_x_s = x_s * ALIGNED, maps_s * ALIGNED, d_y_s * ALIGNED, d_x_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    i, p, n = tl.arange(0, CHUNK), tl.arange(0, CHANNELS), tl.arange(0, STATES)
    start = (chunk * CHUNK).to(tl.int64)
    left = length - chunk * CHUNK
    x += b * x_b * ALIGNED + start * x_s
    d_x += b * d_x_b * ALIGNED + start * d_x_s
    d_y += b * d_y_b * ALIGNED + start * d_y_s
    in_group = b * maps_b * ALIGNED + start * maps_s + group * STATE
    B_tile = load_tile(B + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)  # [CHUNK, STATES]
    C_tile = load_tile(C + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
    scores = tl.dot(B_tile, tl.trans(C_tile), input_precision=PRECISION)  # [CHUNK, CHUNK]: sender, receiver
    seen = i[:, None] <= i[None, :]
    if HAS_DOCUMENTS:
        documents += b * length
        _, end = chunk_documents(documents, chunk, length, CHUNK)
        mine = tl.load(documents + start + i, mask=i < left, other=-1)
        seen = seen & (mine[:, None] == mine[None, :])
    square = (((split * batch + b) * (heads // GROUP) + group) * chunks + chunk) * (CHUNK * CHUNK)
    summed = load_tile(d_scores + square, CHUNK, i, i, CHUNK, CHUNK, True, True)  # receiver, sender
    d_B_tile = tl.dot(tl.trans(summed.to(DTYPE)), C_tile, input_precision=PRECISION)
    for k in tl.range(split * GROUP // SPLITS * BLOCKS, (split + 1) * GROUP // SPLITS * BLOCKS, num_stages=STAGES):
        head = group * GROUP + k // BLOCKS
        p0 = k % BLOCKS * CHANNELS
        column, width = head * HEAD_DIM + p0, HEAD_DIM - p0
        own = (b * heads + head) * (chunks * CHUNK) + start
        dt, sum_t = tl.load(steps + own + i), tl.load(sums + own + i)
        sum_last = tl.load(sums + own + CHUNK - 1)
        out_of = tl.exp(sum_last - sum_t)
        if HAS_DOCUMENTS:
            out_of = tl.where(mine == end, out_of, 0.0)
        at = ((b * chunks + chunk) * heads + head) * (HEAD_DIM * STATE) + p0
        d_state = load_tile(d_states + at, HEAD_DIM, n, p, STATE, width, ALL_N, ALL_P)  # [STATES, CHANNELS]
        x_tile = load_tile(x + column, x_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        d_tile = load_tile(d_y + column, d_y_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        d_x_tile = tl.dot(B_tile, d_state, input_precision=PRECISION) * out_of[:, None]  # [CHUNK, CHANNELS]
        to_end = tl.sum(x_tile.to(tl.float32) * d_x_tile, 1)
        decay = tl.exp(tl.where(seen, sum_t[None, :] - sum_t[:, None], float("-inf")))
        d_x_tile = tl.dot((scores * decay).to(DTYPE), d_tile, d_x_tile, input_precision=PRECISION) * dt[:, None]
        if HAS_D:
            skip = tl.load(D + column + p) if ALL_P else tl.load(D + column + p, mask=p < width, other=0.0)
            d_x_tile += d_tile.to(tl.float32) * skip[None, :]
            d_D_at = d_D + ((b * chunks + chunk) * heads * HEAD_DIM + column)
            tl.store(d_D_at + p, tl.sum(d_tile.to(tl.float32) * x_tile.to(tl.float32), 0), mask=p < width)
        store_tile(d_x + column, d_x_s, i, p, left, width, d_x_tile, WHOLE_CHUNKS, ALL_P)
        weighted = (x_tile.to(tl.float32) * (out_of * dt)[:, None]).to(DTYPE)
        d_B_tile = tl.dot(weighted, tl.trans(d_state), d_B_tile, input_precision=PRECISION)
        part = (k % BLOCKS * batch + b) * heads + head
        tl.store(d_columns + part * (chunks * CHUNK) + start + i, to_end)
    row = heads // GROUP * STATE
    at = ((split * batch + b) * (chunks * CHUNK) + start) * row + group * STATE
    store_tile(d_B + at, row, i, n, CHUNK, STATE, d_B_tile, True, ALL_N)
