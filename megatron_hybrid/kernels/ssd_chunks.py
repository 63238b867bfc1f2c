"""Forward and backward pass of the chunked SSD scan ("Transformers are SSMs", arXiv:2405.21060, section 6).

Inside a chunk the scan is a masked matrix product; between chunks it is the recurrence. With the running sum
``a_1 + ... + a_i`` of ``a = dt A`` from the start of a chunk, and S the state before the chunk::

    y_i = exp(a_1 + ... + a_i) C_i S + sum_{j <= i} exp(a_{j+1} + ... + a_i) (C_i B_j^T) dt_j x_j
    S'  = exp(a_1 + ... + a_q) S + sum_j exp(a_{j+1} + ... + a_q) dt_j B_j^T x_j

The backward pass is written by hand, so that no tensor of size [heads, chunk, chunk] outlives one segment of the
sequence.

Shape letters: b batch, l length, h heads, p head dim, g groups, r = h / g heads of a group, n state dim, k chunks of a
segment, q tokens of a chunk. "r p" is one dimension: the channels of all heads of a group. The kernel knows nothing of
parallelism: its sizes are those of one rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the [b, k, h, q, q] decay matrix of a segment. On a CPU it should stay in cache (2 MiB in fp32); on a GPU
# it should be large enough to fill the device (256 MiB in fp32).
_SEGMENT_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


class ChunkScan(torch.autograd.Function):
    """The scan and its gate; autograd differentiates the discretisation around it.

    The sequence is processed in segments of several chunks. Only the inputs and the state at the start of every chunk
    are saved for the backward pass, which goes through the segments in reverse and recomputes their decay matrices.
    """

    @staticmethod
    def forward(ctx, x, dt, a, B, C, D, z, initial_states, doc, chunk_size, step):
        """x, z [b, l, h, p]; dt, a [b, l, h]; B, C [b, l, g, n]; D [h, p]; initial_states [b, h, p, n]; doc [b, l].

        D, z, initial_states and doc may be None; dt, a and D have the dtype of the states. A segment has ``step``
        chunks of ``chunk_size`` tokens.
        """
        b, _, h, p = x.shape
        g, n = B.shape[2:]
        state = _to_group_major(initial_states, b, h, p, g, n, dt)  # [b, g, n, r p]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = []
        for segment in _segments(x.shape[1], chunk_size, step):
            y_seg, states, state = _segment_forward(segment, x, dt, a, B, C, D, z, doc, state)
            segment.of(y).copy_(y_seg)
            starts.append(states)  # [b, k, g, n, r p]
        ctx.save_for_backward(x, dt, a, B, C, D, z, doc, *starts)
        ctx.chunk_size, ctx.step = chunk_size, step
        ctx.initial_dtype = None if initial_states is None else initial_states.dtype
        return y, _to_head_major(state, h, p)  # [b, l, h, p], [b, h, p, n]

    @staticmethod
    def backward(ctx, dy, d_final):
        """dy [b, l, h, p] and d_final [b, h, p, n] to the gradients of forward's arguments, in their shapes."""
        x, dt, a, B, C, D, z, doc, *starts = ctx.saved_tensors
        b, _, h, p = x.shape
        g, n = B.shape[2:]
        d_state = _to_group_major(d_final, b, h, p, g, n, dt)  # [b, g, n, r p]
        dx, d_dt, d_a, dB, dC, dz = gradients = [
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (x, dt, a, B, C, z)
        ]
        dD = None if D is None else torch.zeros_like(D, memory_format=torch.contiguous_format)
        segments = _segments(x.shape[1], ctx.chunk_size, ctx.step)
        for segment, states in zip(reversed(segments), reversed(starts), strict=True):
            parts, dD_part, d_state = _segment_backward(segment, x, dt, a, B, C, D, z, doc, states, dy, d_state)
            for whole, part in zip(gradients, parts, strict=True):
                if whole is not None:
                    segment.of(whole).copy_(part)
            if dD is not None:
                dD += dD_part
        d_initial = None
        if ctx.initial_dtype is not None:
            d_initial = _to_head_major(d_state, h, p).to(ctx.initial_dtype)  # [b, h, p, n]
        return dx, d_dt, d_a, dB, dC, dD, dz, d_initial, None, None, None


class _Segment(NamedTuple):
    """Tokens ``start`` to ``start + chunks * length``; the last segment may be one shorter chunk."""

    start: int
    chunks: int
    length: int

    def of(self, t: Tensor) -> Tensor:
        """The segment of a [b, l, ...] tensor, as a view [b, k, q, ...]."""
        return t[:, self.start : self.start + self.chunks * self.length].unflatten(1, (self.chunks, self.length))


def chunks_per_segment(x: Tensor, chunk_size: int) -> int:
    """How many chunks of x [b, l, h, p] are processed at a time."""
    b, length, h, _ = x.shape
    # torch.compile would unroll the loop over the segments, and its fused kernels need no cache blocking.
    if torch.compiler.is_compiling():
        return max(1, length // chunk_size)
    budget = _SEGMENT_ELEMENTS.get(x.device.type, _SEGMENT_ELEMENTS["cuda"])
    return max(1, budget // (b * h * chunk_size**2))


def _segments(length: int, chunk_size: int, step: int) -> list[_Segment]:
    whole, rest = divmod(length, chunk_size)
    segments = [_Segment(c * chunk_size, min(step, whole - c), chunk_size) for c in range(0, whole, step)]
    if rest:
        segments.append(_Segment(whole * chunk_size, 1, rest))
    return segments


class _Decay(NamedTuple):
    """Decays of one segment; products across a document boundary are zero."""

    cumulative: Tensor  # sum of a from the chunk's start, inclusive, [b, k, h, q]
    from_start: Tensor  # of the chunk's first state, seen by each token, [b, k, q, h]
    to_end: Tensor  # of each token, seen by the chunk's last state, [b, k, q, h]
    whole: Tensor  # of the first state, seen by the last one, [b, k, h]
    crosses: Tensor | None  # pairs of tokens in different documents, [b, k, 1, q, q]


def _decays(segment: _Segment, a: Tensor, doc: Tensor | None) -> _Decay:
    cumulative = segment.of(a).cumsum(2)  # [b, k, q, h]
    last = cumulative[:, :, -1:]  # [b, k, 1, h]
    from_start = torch.exp(cumulative)
    to_end = torch.exp(last - cumulative)
    whole = from_start[:, :, -1]  # [b, k, h]
    crosses = None
    if doc is not None:
        doc_seg = segment.of(doc)  # [b, k, q]
        before = max(segment.start - 1, 0)
        ends = doc_seg[:, :, -1]  # document of each chunk's last token, [b, k]
        previous = torch.cat(
            [doc[:, before : before + 1], ends[:, :-1]], dim=1
        )  # of the token before each chunk, [b, k]
        from_start = from_start * (doc_seg == previous[..., None])[..., None]
        to_end = to_end * (doc_seg == ends[..., None])[..., None]
        whole = whole * (ends == previous)[..., None]
        crosses = (doc_seg[..., :, None] != doc_seg[..., None, :])[:, :, None]  # [b, k, 1, q, q]
    return _Decay(cumulative.transpose(2, 3).contiguous(), from_start, to_end, whole, crosses)


def _decay_matrix(cumulative: Tensor, g: int) -> Tensor:
    """exp(sum of a over (j, i]) for i >= j, and 1 above the diagonal; [b, k, h, q] to [b, k, g, r, q, q]."""
    difference = cumulative[..., :, None] - cumulative[..., None, :]  # [b, k, h, q, q]
    return difference.tril_().exp_().unflatten(2, (g, -1))


def _scores(C: Tensor, B: Tensor, crosses: Tensor | None, mm_dtype: torch.dtype) -> Tensor:
    """C B^T of every group, zero for later tokens and other documents; [b, k, g, q, n] twice to [b, k, g, q, q]."""
    scores = _mm(C, B.mT, mm_dtype).tril_()
    return scores if crosses is None else scores.masked_fill_(crosses, 0.0)


def _segment_forward(segment, x, dt, a, B, C, D, z, doc, state):
    """One segment of ChunkScan.forward, from the state before it, [b, g, n, r p].

    Returns:
        y [b, k, q, h, p], the states before each chunk [b, k, g, n, r p], and the state after the segment.
    """
    g, mm_dtype = B.shape[2], _matmul_dtype(x)
    dtype = dt.dtype
    x, dt = segment.of(x).to(dtype), segment.of(dt)  # [b, k, q, h, p], [b, k, q, h]
    B, C = (segment.of(t).to(dtype).transpose(2, 3) for t in (B, C))  # [b, k, g, q, n]
    decay = _decays(segment, a, doc)

    weighted = _rows(x * (dt * decay.to_end)[..., None], g)  # [b, k, g, q, r p]
    updates = _mm(B.mT, weighted, mm_dtype)  # [b, k, g, n, r p]
    states, state = _pass_states(state, decay.whole, updates)  # [b, k, g, n, r p], [b, g, n, r p]
    y = _heads_last(_mm(C, states, mm_dtype), x.shape) * decay.from_start[..., None]  # [b, k, q, h, p]

    scores = _scores(C, B, decay.crosses, mm_dtype)  # [b, k, g, q, q]
    mixing = _decay_matrix(decay.cumulative, g).mul_(scores[:, :, :, None])  # [b, k, g, r, q, q]
    inside = _mm(mixing, _heads_first(x * dt[..., None], g), mm_dtype)  # [b, k, g, r, q, p]
    y += inside.flatten(2, 3).transpose(2, 3)  # [b, k, q, h, p]
    if D is not None:
        y.addcmul_(D, x)
    if z is not None:
        y *= F.silu(segment.of(z).to(dtype))
    return y, states, state


def _segment_backward(segment, x, dt, a, B, C, D, z, doc, states, dy, d_state):
    """One segment of ChunkScan.backward, from the gradient of the state after it, [b, g, n, r p].

    Returns:
        Gradients of x, dt, a, B, C and z, each [b, k, q, ...]; dD [h, p]; the gradient of the state before the segment.
    """
    g, mm_dtype = B.shape[2], _matmul_dtype(x)
    dtype = dt.dtype
    x, dy, dt = segment.of(x).to(dtype), segment.of(dy).to(dtype), segment.of(dt)  # [b, k, q, h, p] twice, [b, k, q, h]
    B, C = (segment.of(t).to(dtype).transpose(2, 3) for t in (B, C))  # [b, k, g, q, n]
    decay = _decays(segment, a, doc)
    x_dt = x * dt[..., None]
    if z is not None:
        d_gated, z = dy, segment.of(z).to(dtype)  # [b, k, q, h, p]
        dy = dy * F.silu(z)

    # Through the states: y_i = from_start_i C_i S and S' = whole S + sum_j to_end_j B_j x_j^T.
    dy_start = dy * decay.from_start[..., None]
    dy_rows = _rows(dy_start, g)  # [b, k, g, q, r p]
    d_states, d_state = _pass_states(d_state, decay.whole, _mm(C.mT, dy_rows, mm_dtype), reverse=True)
    d_whole = _heads_last(states * d_states, (*x.shape[:2], B.shape[-1], *x.shape[3:]))  # [b, k, n, h, p]
    d_whole = d_whole.sum((2, 4)) * decay.whole  # [b, k, h]
    from_states = _heads_last(_mm(C, states, mm_dtype), x.shape)  # [b, k, q, h, p]
    d_start = (from_states * dy_start).sum(-1)  # [b, k, q, h]
    dC = _mm(dy_rows, states.mT, mm_dtype)  # [b, k, g, q, n]
    x_end = x_dt * decay.to_end[..., None]
    dB = _mm(_rows(x_end, g), d_states.mT, mm_dtype)  # [b, k, g, q, n]
    dx = _heads_last(_mm(B, d_states, mm_dtype), x.shape)  # [b, k, q, h, p]
    d_end = (x_end * dx).sum(-1)  # [b, k, q, h]
    dx = dx * decay.to_end[..., None]

    # Inside the chunk: y_i = sum_j M_ij x_j with M = decay matrix * scores.
    scores = _scores(C, B, decay.crosses, mm_dtype)  # [b, k, g, q, q]
    matrix = _decay_matrix(decay.cumulative, g)  # [b, k, g, r, q, q]
    dy_heads, x_heads = _heads_first(dy, g), _heads_first(x_dt, g)  # [b, k, g, r, q, p]
    d_mixing = _mm(dy_heads, x_heads.mT, mm_dtype).mul_(matrix)  # [b, k, g, r, q, q]
    d_scores = d_mixing.sum(3).tril_()  # [b, k, g, q, q]
    if decay.crosses is not None:
        d_scores.masked_fill_(decay.crosses, 0.0)
    dC += _mm(d_scores, B, mm_dtype)
    dB += _mm(d_scores.mT, C, mm_dtype)
    mixing = matrix.mul_(scores[:, :, :, None])
    dx += _mm(mixing.mT, dy_heads, mm_dtype).flatten(2, 3).transpose(2, 3)  # [b, k, q, h, p]

    dz = None
    if z is not None:
        y = from_states * decay.from_start[..., None]
        y += _mm(mixing, x_heads, mm_dtype).flatten(2, 3).transpose(2, 3)  # [b, k, q, h, p]
        if D is not None:
            y.addcmul_(D, x)
        dz = torch.ops.aten.silu_backward(y.mul_(d_gated), z)

    d_a = _decay_gradient(d_mixing.mul_(scores[:, :, :, None]), d_start, d_end, d_whole)
    d_dt = (dx * x).sum(-1)  # [b, k, q, h]
    dx = dx.mul_(dt[..., None])
    if D is not None:
        dx.addcmul_(D, dy)
    dD = None if D is None else (dy * x).sum((0, 1, 2))  # [h, p]
    return (dx, d_dt, d_a, dB.transpose(2, 3), dC.transpose(2, 3), dz), dD, d_state


def _decay_gradient(paths: Tensor, d_start: Tensor, d_end: Tensor, d_whole: Tensor) -> Tensor:
    """The gradient of a, [b, k, q, h]: the sum over all paths from a token before t to one at or after t.

    Summing the paths as they are, rather than subtracting column sums from row sums, costs one more pass and leaves
    no rounding error of paths that do not cross t: the gradient is exactly zero across documents.

    Args:
        paths: Gradient that flows from token j to token i through decay (i, j), [b, k, g, r, q, q]; overwritten.
        d_start: From the state before the chunk to each token, [b, k, q, h].
        d_end: From each token to the state after the chunk, [b, k, q, h].
        d_whole: From the state before the chunk to the state after it, [b, k, h].
    """
    crossing = paths.tril_(-1).cumsum_(-1).tril_(-1).sum(-2)  # [b, k, g, r, q]
    d_a = _shift(crossing.flatten(2, 3).transpose(2, 3)) + _shift(d_end.cumsum(2))  # [b, k, q, h]
    d_a += d_start.flip(2).cumsum(2).flip(2) + d_whole[:, :, None]
    return d_a


def _pass_states(state: Tensor, whole: Tensor, updates: Tensor, reverse: bool = False):
    """Runs ``state = whole_c state + updates_c`` over the chunks c of a segment.

    Args:
        state: Before the first chunk, [b, g, n, r p].
        whole: [b, k, h].
        updates: [b, k, g, n, r p].
        reverse: From the last chunk to the first.

    Returns:
        The state before each chunk (after it, if reverse), [b, k, g, n, r p], and the last state, [b, g, n, r p].
    """
    b, k, g, n, _ = updates.shape
    whole = whole.view(b, k, g, 1, -1, 1)  # [b, k, g, 1, r, 1]
    heads = whole.shape[4]
    states = []
    for c in reversed(range(k)) if reverse else range(k):
        states.append(state)
        update = updates[:, c].unflatten(-1, (heads, -1))  # [b, g, n, r, p]
        state = torch.addcmul(update, state.unflatten(-1, (heads, -1)), whole[:, c]).flatten(-2)  # [b, g, n, r p]
    if reverse:
        states.reverse()
    return torch.stack(states, dim=1) if k > 1 else states[0][:, None], state


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., i, j] times [..., j, m], with operands in ``dtype`` and sums in fp32 (fp64 for fp64)."""
    lead = left.shape[:-2]
    left = left.to(dtype).reshape(-1, *left.shape[-2:])
    right = right.to(dtype).reshape(-1, *right.shape[-2:])
    if dtype in (torch.float32, torch.float64):
        out = torch.bmm(left, right)
    else:
        out = torch.bmm(left, right, out_dtype=torch.float32)
    return out.view(*lead, *out.shape[-2:])


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """Half-precision operands on CUDA, where tensor cores accumulate in fp32; else the dtype of the states.

    CPUs without AMX emulate bf16 products: they are slower than fp32 ones, and their results are rounded to bf16.
    There the segment is converted to fp32 first, which costs one cheap pass.
    """
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype if half else state_dtype(x)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of decays and states."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(t: Tensor, g: int) -> Tensor:
    """[b, k, q, h, p] -> [b, k, g, q, r p]: all heads of a group side by side."""
    return t.unflatten(3, (g, -1)).transpose(2, 3).flatten(-2)


def _heads_last(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[b, k, g, q, r p] -> [b, k, q, h, p], the inverse of :func:`_rows`."""
    return t.transpose(2, 3).reshape(shape)


def _heads_first(t: Tensor, g: int) -> Tensor:
    """[b, k, q, h, p] -> [b, k, g, r, q, p], a view."""
    return t.transpose(2, 3).unflatten(2, (g, -1))


def _to_group_major(states, b, h, p, g, n, like: Tensor) -> Tensor:
    """[b, h, p, n] (or None, zeros) -> [b, g, n, r p] in the dtype of ``like``."""
    if states is None:
        return like.new_zeros(b, g, n, h // g * p)
    states = states.to(like.dtype).view(b, g, h // g, p, n)  # [b, g, r, p, n]
    return states.permute(0, 1, 4, 2, 3).reshape(b, g, n, h // g * p)  # [b, g, n, r p]


def _to_head_major(states: Tensor, h: int, p: int) -> Tensor:
    """[b, g, n, r p] -> [b, h, p, n]."""
    b, g, n, _ = states.shape
    return states.view(b, g, n, h // g, p).permute(0, 1, 3, 4, 2).reshape(b, h, p, n)


def _shift(t: Tensor) -> Tensor:
    """Shifts [b, k, q, h] by one token, with a zero in front."""
    return F.pad(t[:, :, :-1], (0, 0, 1, 0))
