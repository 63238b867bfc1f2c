"""The output of the Mamba-2 scan from the states at the chunks' starts.

    y_i = sum_(j <= i) (C_i . B_j) exp(sum_i - sum_j) dt_j x_j + exp(sum_i) S C_i + D x_i,    out = y silu(z)

One program for a chunk and some heads of one group: C B^T is computed once for all of them. The backward pass computes
y again, for the gradient of the gate:

    dz = dout y silu'(z),    dy = dout silu(z)

``ssd_scan.py`` has the shape letters.
"""

import triton
import triton.language as tl

from megatron_hybrid.kernels.triton.scan_walks import chunk_documents, gate
from megatron_hybrid.kernels.triton.tiles import load_tile, store_tile


@triton.jit
def output_kernel(
    x, z, B, C, D, steps, sums, documents, states, out, d_out, d_z,
    x_b, x_s, z_b, z_s, maps_b, maps_s, out_b, out_s, d_out_b, d_out_s, d_z_b, d_z_s,
    length, heads, chunks, SPLITS,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, GROUP: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WHOLE_CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x, z, out [b, s, h p], B and C [b, s, g n]; a program's heads are those of split ``program_id(2) % SPLITS``.

    The backward pass, which without z does not need this kernel, reads d_out and writes d_z and, as ``out``, dy. The
    function is long because Triton has no structures: a kernel's parameters are listed one by one.
    """
    x_s, z_s, maps_s = x_s * ALIGNED, z_s * ALIGNED, maps_s * ALIGNED
    out_s, d_out_s, d_z_s = out_s * ALIGNED, d_out_s * ALIGNED, d_z_s * ALIGNED
    BLOCKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    ALL_P: tl.constexpr = HEAD_DIM % CHANNELS == 0
    ALL_N: tl.constexpr = STATE == STATES
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    i, p, n = tl.arange(0, CHUNK), tl.arange(0, CHANNELS), tl.arange(0, STATES)
    start = (chunk * CHUNK).to(tl.int64)
    left = length - chunk * CHUNK
    x += b * x_b * ALIGNED + start * x_s
    z += b * z_b * ALIGNED + start * z_s
    out += b * out_b * ALIGNED + start * out_s
    d_out += b * d_out_b * ALIGNED + start * d_out_s
    d_z += b * d_z_b * ALIGNED + start * d_z_s
    in_group = b * maps_b * ALIGNED + start * maps_s + group * STATE
    B_tile = load_tile(B + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)  # [CHUNK, STATES]
    C_tile = load_tile(C + in_group, maps_s, i, n, left, STATE, WHOLE_CHUNKS, ALL_N)
    scores = tl.dot(C_tile, tl.trans(B_tile), input_precision=PRECISION)  # [CHUNK, CHUNK]
    seen = i[:, None] >= i[None, :]
    if HAS_DOCUMENTS:
        documents += b * length
        before, end = chunk_documents(documents, chunk, length, CHUNK)
        mine = tl.load(documents + start + i, mask=i < left, other=-1)
        seen = seen & (mine[:, None] == mine[None, :])
    for k in tl.range(split * GROUP // SPLITS * BLOCKS, (split + 1) * GROUP // SPLITS * BLOCKS, num_stages=STAGES):
        head = group * GROUP + k // BLOCKS
        p0 = k % BLOCKS * CHANNELS
        column, width = head * HEAD_DIM + p0, HEAD_DIM - p0
        own = (b * heads + head) * (chunks * CHUNK) + start
        dt, sum_t = tl.load(steps + own + i), tl.load(sums + own + i)
        at = ((b * chunks + chunk) * heads + head) * (HEAD_DIM * STATE) + p0
        state = load_tile(states + at, HEAD_DIM, n, p, STATE, width, ALL_N, ALL_P)  # [STATES, CHANNELS]
        x_tile = load_tile(x + column, x_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        if HAS_Z:
            z_tile = load_tile(z + column, z_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        if BACKWARD:
            d_tile = load_tile(d_out + column, d_out_s, i, p, left, width, WHOLE_CHUNKS, ALL_P)
        into = tl.exp(sum_t)
        if HAS_DOCUMENTS:
            into = tl.where(mine == before, into, 0.0)
        y = tl.dot(C_tile, state, input_precision=PRECISION) * into[:, None]  # [CHUNK, CHANNELS]
        decay = tl.exp(tl.where(seen, sum_t[:, None] - sum_t[None, :], float("-inf")))
        y = tl.dot((scores * decay * dt[None, :]).to(DTYPE), x_tile, y, input_precision=PRECISION)
        if HAS_D:
            skip = tl.load(D + column + p) if ALL_P else tl.load(D + column + p, mask=p < width, other=0.0)
            y += x_tile.to(tl.float32) * skip[None, :]
        if HAS_Z:
            gated, slope = gate(z_tile.to(tl.float32))
        if BACKWARD:
            d_wide = d_tile.to(tl.float32)
            store_tile(out + column, out_s, i, p, left, width, d_wide * gated, WHOLE_CHUNKS, ALL_P)
            store_tile(d_z + column, d_z_s, i, p, left, width, d_wide * y * slope, WHOLE_CHUNKS, ALL_P)
        else:
            if HAS_Z:
                y *= gated
            store_tile(out + column, out_s, i, p, left, width, y, WHOLE_CHUNKS, ALL_P)
