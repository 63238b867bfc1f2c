"""The state-space dual (SSD) scan of Mamba-2 in plain PyTorch: what it computes, and a readable reference.

Each head has a state ``S`` of shape [p, n] that starts at ``initial_states`` or zero::

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

:func:`ssd_recurrence` is this recurrence as a loop over the tokens. :func:`ssd_chunk_scan` computes the same in
chunks ("Transformers are SSMs", arXiv:2405.21060, section 6); ``ssd_chunks.py`` has its forward and backward pass.

Shape letters: b batch, l length, h heads, p head dim, g groups, n state dim. The kernel knows nothing of parallelism:
its sizes are those of one rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import document_number
from .ssd_chunks import ChunkScan, chunks_per_segment, state_dtype


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
    """The reference: the SSD scan one token at a time, in the dtype of its inputs; slow.

    Arguments, result and errors are those of :func:`ssd_chunk_scan`, without the chunk size.
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    dt = _discretise(dt, dt_bias, dt_softplus, dt_limit)  # [b, l, h]
    B = B.repeat_interleave(h // g, dim=2)  # [b, l, h, n]
    C = C.repeat_interleave(h // g, dim=2)  # [b, l, h, n]
    state = x.new_zeros(b, h, p, n) if initial_states is None else initial_states
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1, 1)
            state = torch.where(same, state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # [b, h, 1, 1]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]  # [b, h, p, n]
        state = decay * state + update
        ys.append((state * C[:, t, :, None, :]).sum(-1))  # [b, h, p]
    y = torch.stack(ys, dim=1)  # [b, l, h, p]
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
        dt: step size before ``dt_bias``, softplus and ``dt_limit``, [b, l, h].
        A: decay rate, negative in Mamba-2, [h].
        B: input map, [b, l, g, n]; head ``i`` uses group ``i // (h / g)``.
        C: output map, [b, l, g, n].
        chunk_size: tokens of a chunk; it changes the speed, not the result.
        D: skip weight, [h] or [h, p].
        z: gate, [b, l, h, p]; the result is multiplied by silu(z).
        dt_bias: added to ``dt``, [h].
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: clamp the step size to this range, after softplus.
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
    dtype = state_dtype(x)
    dt = _discretise(dt.to(dtype), dt_bias, dt_softplus, dt_limit)  # [b, l, h]
    # exp(log(tiny)) is as good as zero, so the clamp changes no result. Without it, the small steps that follow one
    # enormous step would be lost in the rounding of the running sum.
    a = (dt * A.to(dtype)).clamp(min=math.log(torch.finfo(dtype).tiny))  # [b, l, h]
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(dtype).expand(x.shape[2:])  # [h, p]
    doc = None if seq_idx is None else document_number(seq_idx)  # [b, l]
    # Chosen once: forward and backward must cut the sequence alike, compiled or not.
    step = chunks_per_segment(x, chunk_size)
    y, final_states = ChunkScan.apply(x, dt, a, B, C, D, z, initial_states, doc, chunk_size, step)
    return (y, final_states) if return_final_states else y


def _discretise(dt, dt_bias, dt_softplus, dt_limit) -> Tensor:
    """The step size [b, l, h] as the recurrence uses it."""
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
