"""The state-space dual (SSD) scan of Mamba-2 in plain PyTorch.

Per head, with a state ``S`` of shape [p, n] that starts at ``initial_states`` or zero::

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

:func:`ssd_recurrence` is that sentence as a loop: the reference. :func:`ssd_chunk_scan` computes
the same in chunks ("Transformers are SSMs", arXiv:2405.21060, section 6): inside a chunk a masked
matrix product, between chunks the recurrence. Its backward is written by hand, so that nothing of
size [heads, chunk, chunk] outlives one segment of the sequence.

Shape letters: b batch, l length, h heads, p head dim, g groups, r = h / g heads of a group,
n state dim, k chunks of a segment, q tokens of a chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import document_number

# Elements of the [b, k, h, q, q] decay matrix handled at a time. On a CPU it should stay in cache
# (2 MiB in fp32); on a GPU it should be large enough to fill the device (256 MiB in fp32).
_SEGMENT_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The SSD scan one token at a time, in the dtype of its inputs: slow and readable.

    Arguments, result and errors are those of :func:`ssd_chunk_scan`, without the chunk size.
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    dt = _discretise(dt, dt_bias, dt_softplus, dt_limit)
    B = B.repeat_interleave(h // g, dim=2)
    C = C.repeat_interleave(h // g, dim=2)
    state = x.new_zeros(b, h, p, n) if initial_states is None else initial_states
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1, 1)
            state = torch.where(same, state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        state = decay * state + update
        ys.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_final_states else y


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The SSD scan in chunks, differentiable in every floating-point argument.

    Decays and states are held in fp32 (fp64 for fp64 ``x``) whatever the dtype of the inputs.

    Args:
        x: input, [b, l, h, p].
        dt: step size, [b, l, h], before ``dt_bias``, softplus and ``dt_limit``.
        A: decay rate, [h], negative in Mamba-2.
        B: input map, [b, l, g, n]; head ``i`` uses group ``i // (h / g)``.
        C: output map, [b, l, g, n].
        chunk_size: tokens of a chunk; the result does not depend on it, speed does.
        D: skip weight, [h] or [h, p].
        z: gate, [b, l, h, p]; the result is multiplied by silu(z).
        dt_bias: [h], added to ``dt``.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: then clamp to this range.
        initial_states: state before the first token, [b, h, p, n]; with ``seq_idx`` it belongs
            to the first document.
        seq_idx: document of each token, [b, l], int; the state restarts at zero where it changes.
        return_final_states: also return the state after the last token, [b, h, p, n], fp32.

    Returns:
        y [b, l, h, p] in the dtype of ``x``, or ``(y, final_states)``.

    Raises:
        ValueError: shapes disagree, heads do not divide into groups, or chunk_size < 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1 (usually 64 to 256)")
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    dtype = _state_dtype(x)
    dt = _discretise(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    # exp(log(tiny)) is zero for all purposes, so the clamp changes no result; without it one
    # enormous step would swallow, in the running sum, the small ones that follow it.
    a = (dt * A.to(dtype)).clamp(min=math.log(torch.finfo(dtype).tiny))
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(dtype).expand(x.shape[2:])
    doc = None if seq_idx is None else document_number(seq_idx)
    # Chosen once: forward and backward must cut the sequence alike, compiled or not.
    step = _chunks_per_segment(x, chunk_size)
    y, final_states = _ChunkScan.apply(x, dt, a, B, C, D, z, initial_states, doc, chunk_size, step)
    return (y, final_states) if return_final_states else y


class _ChunkScan(torch.autograd.Function):
    """The scan and its gate; the discretisation around it is left to autograd.

    The sequence is walked in segments of some chunks. Only the inputs and the state at the start
    of every chunk are kept for the backward, which walks the segments in reverse and computes
    each segment's decay matrix again.
    """

    @staticmethod
    def forward(ctx, x, dt, a, B, C, D, z, initial_states, doc, chunk_size, step):
        b, _, h, p = x.shape
        g, n = B.shape[2:]
        state = _to_group_major(initial_states, b, h, p, g, n, dt)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = []
        for segment in _segments(x.shape[1], chunk_size, step):
            y_seg, states, state = _segment_forward(segment, x, dt, a, B, C, D, z, doc, state)
            segment.of(y).copy_(y_seg)
            starts.append(states)
        ctx.save_for_backward(x, dt, a, B, C, D, z, doc, *starts)
        ctx.chunk_size, ctx.step = chunk_size, step
        ctx.initial_dtype = None if initial_states is None else initial_states.dtype
        return y, _to_head_major(state, h, p)

    @staticmethod
    def backward(ctx, dy, d_final):
        x, dt, a, B, C, D, z, doc, *starts = ctx.saved_tensors
        b, _, h, p = x.shape
        g, n = B.shape[2:]
        d_state = _to_group_major(d_final, b, h, p, g, n, dt)
        dx, d_dt, d_a, dB, dC, dz = wholes = [
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (x, dt, a, B, C, z)
        ]
        dD = None if D is None else torch.zeros_like(D, memory_format=torch.contiguous_format)
        segments = _segments(x.shape[1], ctx.chunk_size, ctx.step)
        for segment, states in zip(reversed(segments), reversed(starts), strict=True):
            parts, dD_part, d_state = _segment_backward(segment, x, dt, a, B, C, D, z, doc, states, dy, d_state)
            for whole, part in zip(wholes, parts, strict=True):
                if whole is not None:
                    segment.of(whole).copy_(part)
            if dD is not None:
                dD += dD_part
        d_initial = None
        if ctx.initial_dtype is not None:
            d_initial = _to_head_major(d_state, h, p).to(ctx.initial_dtype)
        return dx, d_dt, d_a, dB, dC, dD, dz, d_initial, None, None, None


class _Segment(NamedTuple):
    """Tokens ``start`` to ``start + chunks * length``; the last one may be a shorter chunk."""

    start: int
    chunks: int
    length: int

    def of(self, t: Tensor) -> Tensor:
        """The segment of a [b, l, ...] tensor, as a view [b, k, q, ...]."""
        return t[:, self.start : self.start + self.chunks * self.length].unflatten(1, (self.chunks, self.length))


def _chunks_per_segment(x: Tensor, chunk_size: int) -> int:
    b, length, h, _ = x.shape
    # A compiled graph would unroll the loop; its fused kernels need no cache blocking.
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
    cumulative = segment.of(a).cumsum(2)
    last = cumulative[:, :, -1:]
    from_start = torch.exp(cumulative)
    to_end = torch.exp(last - cumulative)
    whole = from_start[:, :, -1]
    crosses = None
    if doc is not None:
        doc_seg = segment.of(doc)
        before = max(segment.start - 1, 0)
        ends = doc_seg[:, :, -1]
        previous = torch.cat([doc[:, before : before + 1], ends[:, :-1]], dim=1)
        from_start = from_start * (doc_seg == previous[..., None])[..., None]
        to_end = to_end * (doc_seg == ends[..., None])[..., None]
        whole = whole * (ends == previous)[..., None]
        crosses = (doc_seg[..., :, None] != doc_seg[..., None, :])[:, :, None]
    return _Decay(cumulative.transpose(2, 3).contiguous(), from_start, to_end, whole, crosses)


def _decay_matrix(cumulative: Tensor, g: int) -> Tensor:
    """exp(sum of a over (j, i]) for i >= j, and 1 above the diagonal; [b, k, g, r, q, q]."""
    difference = cumulative[..., :, None] - cumulative[..., None, :]
    return difference.tril_().exp_().unflatten(2, (g, -1))


def _scores(C: Tensor, B: Tensor, crosses: Tensor | None, mm_dtype: torch.dtype) -> Tensor:
    """C B^T of every group, zero where no information may flow; [b, k, g, q, q]."""
    scores = _mm(C, B.mT, mm_dtype).tril_()
    return scores if crosses is None else scores.masked_fill_(crosses, 0.0)


def _segment_forward(segment, x, dt, a, B, C, D, z, doc, state):
    g, mm_dtype = B.shape[2], _matmul_dtype(x)
    dtype = dt.dtype
    x, dt = segment.of(x).to(dtype), segment.of(dt)
    B, C = (segment.of(t).to(dtype).transpose(2, 3) for t in (B, C))
    decay = _decays(segment, a, doc)

    weighted = _rows(x * (dt * decay.to_end)[..., None], g)
    updates = _mm(B.mT, weighted, mm_dtype)
    states, state = _pass_states(state, decay.whole, updates)
    y = _heads_last(_mm(C, states, mm_dtype), x.shape) * decay.from_start[..., None]

    scores = _scores(C, B, decay.crosses, mm_dtype)
    mixing = _decay_matrix(decay.cumulative, g).mul_(scores[:, :, :, None])
    inside = _mm(mixing, _heads_first(x * dt[..., None], g), mm_dtype)
    y += inside.flatten(2, 3).transpose(2, 3)
    if D is not None:
        y.addcmul_(D, x)
    if z is not None:
        y *= F.silu(segment.of(z).to(dtype))
    return y, states, state


def _segment_backward(segment, x, dt, a, B, C, D, z, doc, states, dy, d_state):
    g, mm_dtype = B.shape[2], _matmul_dtype(x)
    dtype = dt.dtype
    x, dy, dt = segment.of(x).to(dtype), segment.of(dy).to(dtype), segment.of(dt)
    B, C = (segment.of(t).to(dtype).transpose(2, 3) for t in (B, C))
    decay = _decays(segment, a, doc)
    x_dt = x * dt[..., None]
    if z is not None:
        d_gated, z = dy, segment.of(z).to(dtype)
        dy = dy * F.silu(z)

    # Through the states: y_i = from_start_i C_i S and S' = whole S + sum_j to_end_j B_j x_j^T.
    dy_start = dy * decay.from_start[..., None]
    dy_rows = _rows(dy_start, g)
    d_states, d_state = _pass_states(d_state, decay.whole, _mm(C.mT, dy_rows, mm_dtype), reverse=True)
    d_whole = _heads_last(states * d_states, (*x.shape[:2], B.shape[-1], *x.shape[3:]))
    d_whole = d_whole.sum((2, 4)) * decay.whole
    from_states = _heads_last(_mm(C, states, mm_dtype), x.shape)
    d_start = (from_states * dy_start).sum(-1)
    dC = _mm(dy_rows, states.mT, mm_dtype)
    x_end = x_dt * decay.to_end[..., None]
    dB = _mm(_rows(x_end, g), d_states.mT, mm_dtype)
    dx = _heads_last(_mm(B, d_states, mm_dtype), x.shape)
    d_end = (x_end * dx).sum(-1)
    dx = dx * decay.to_end[..., None]

    # Inside the chunk: y_i = sum_j M_ij x_j with M = decay matrix * scores.
    scores = _scores(C, B, decay.crosses, mm_dtype)
    matrix = _decay_matrix(decay.cumulative, g)
    dy_heads, x_heads = _heads_first(dy, g), _heads_first(x_dt, g)
    d_mixing = _mm(dy_heads, x_heads.mT, mm_dtype).mul_(matrix)
    d_scores = d_mixing.sum(3).tril_()
    if decay.crosses is not None:
        d_scores.masked_fill_(decay.crosses, 0.0)
    dC += _mm(d_scores, B, mm_dtype)
    dB += _mm(d_scores.mT, C, mm_dtype)
    mixing = matrix.mul_(scores[:, :, :, None])
    dx += _mm(mixing.mT, dy_heads, mm_dtype).flatten(2, 3).transpose(2, 3)

    dz = None
    if z is not None:
        y = from_states * decay.from_start[..., None]
        y += _mm(mixing, x_heads, mm_dtype).flatten(2, 3).transpose(2, 3)
        if D is not None:
            y.addcmul_(D, x)
        dz = torch.ops.aten.silu_backward(y.mul_(d_gated), z)

    # d/da_t is the sum over all paths from a token before t to one at or after t. Summing them as
    # they are, rather than the row sums less the column sums, costs one more pass and leaves no
    # rounding residue of paths that do not cross t: it is zero across documents.
    paths = d_mixing.mul_(scores[:, :, :, None]).tril_(-1).cumsum_(-1).tril_(-1).sum(-2)
    d_a = _shift(paths.flatten(2, 3).transpose(2, 3)) + _shift(d_end.cumsum(2))
    d_a += d_start.flip(2).cumsum(2).flip(2) + d_whole[:, :, None]

    d_dt = (dx * x).sum(-1)
    dx = dx.mul_(dt[..., None])
    if D is not None:
        dx.addcmul_(D, dy)
    dD = None if D is None else (dy * x).sum((0, 1, 2))
    return (dx, d_dt, d_a, dB.transpose(2, 3), dC.transpose(2, 3), dz), dD, d_state


def _pass_states(state: Tensor, whole: Tensor, updates: Tensor, reverse: bool = False):
    """Run ``state = whole_c state + updates_c`` over the chunks of a segment.

    state [b, g, n, r p], whole [b, k, h], updates [b, k, g, n, r p]. Returns the state before
    each chunk (after it, if reverse), [b, k, g, n, r p], and the last state.
    """
    b, k, g, n, _ = updates.shape
    whole = whole.view(b, k, g, 1, -1, 1)
    heads = whole.shape[4]
    met = []
    for c in reversed(range(k)) if reverse else range(k):
        met.append(state)
        update = updates[:, c].unflatten(-1, (heads, -1))
        state = torch.addcmul(update, state.unflatten(-1, (heads, -1)), whole[:, c]).flatten(-2)
    if reverse:
        met.reverse()
    return torch.stack(met, dim=1) if k > 1 else met[0][:, None], state


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched product with operands in ``dtype`` and sums in fp32 (fp64 for fp64)."""
    lead = left.shape[:-2]
    left = left.to(dtype).reshape(-1, *left.shape[-2:])
    right = right.to(dtype).reshape(-1, *right.shape[-2:])
    if dtype in (torch.float32, torch.float64):
        out = torch.bmm(left, right)
    else:
        out = torch.bmm(left, right, out_dtype=torch.float32)
    return out.view(*lead, *out.shape[-2:])


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """Half-precision operands on CUDA, where tensor cores sum them in fp32; else the state dtype.

    CPUs without AMX emulate bf16 products, slower than fp32 ones, and round their results to
    bf16: there the segment is converted to fp32 first, which costs one cheap pass.
    """
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype if half else _state_dtype(x)


def _state_dtype(x: Tensor) -> torch.dtype:
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
    states = states.to(like.dtype).view(b, g, h // g, p, n)
    return states.permute(0, 1, 4, 2, 3).reshape(b, g, n, h // g * p)


def _to_head_major(states: Tensor, h: int, p: int) -> Tensor:
    """[b, g, n, r p] -> [b, h, p, n]."""
    b, g, n, _ = states.shape
    return states.view(b, g, n, h // g, p).permute(0, 1, 3, 4, 2).reshape(b, h, p, n)


def _shift(t: Tensor) -> Tensor:
    """Move by one along dim 2, [b, k, q, h], with a zero in front."""
    return F.pad(t[:, :, :-1], (0, 0, 1, 0))


def _discretise(dt, dt_bias, dt_softplus, dt_limit) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    low, high = dt_limit
    return dt if (low, high) == (0.0, math.inf) and dt_softplus else dt.clamp(low, high)


def _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and B {tuple(B.shape)}; "
            "they must be [b, l, heads, head_dim] and [b, l, groups, state]"
        )
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    if length == 0:
        raise ValueError("x has length 0; pass at least one token")
    if g == 0 or h % g:
        raise ValueError(f"{h} heads do not divide into {g} groups; make heads a multiple of groups")
    d_shape = (h,) if D is None or D.dim() == 1 else (h, p)
    wanted = {
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "B": (B, (b, length, g, n)),
        "C": (C, (b, length, g, n)),
        "D": (D, d_shape),
        "z": (z, (b, length, h, p)),
        "dt_bias": (dt_bias, (h,)),
        "initial_states": (initial_states, (b, h, p, n)),
        "seq_idx": (seq_idx, (b, length)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} "
                f"and B {tuple(B.shape)} it must be {shape}"
            )
