"""The Mamba-2 scan on CUDA, forward and backward: launches of the kernels in ``scan_*.py``.

``kernels/ssd.py`` has the formula. Shape letters: b batch, s tokens, h heads, p head dim, g groups, n state dim, c
chunks. Tensors are views of any strides whose last dimension is contiguous: columns of the layer's own [s, b, ...]
tensors, transposed. Products have operands in the dtype of x and sums in fp32; states between kernels are in the dtype
of x. Nothing depends on the order in which programs run: results are bitwise identical from run to run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.kernels.triton.configs import launch_options
from megatron_hybrid.kernels.triton.scan_gradient import receivers_kernel, senders_kernel
from megatron_hybrid.kernels.triton.scan_output import output_kernel
from megatron_hybrid.kernels.triton.scan_steps import steps_backward_kernel, steps_kernel
from megatron_hybrid.kernels.triton.scan_walks import state_gradients_kernel, states_kernel
from megatron_hybrid.kernels.triton.tiles import strides_in_loads

CHUNK = 64
"""Tokens of a chunk; a matrix product on Hopper has at least 64 rows."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Scan(NamedTuple):
    """The arguments of a scan that its forward and backward pass share."""

    x: Tensor
    """[b, s, h p]"""
    z: Tensor | None
    """Gate, [b, s, h p]; the output is multiplied by silu(z)."""
    B: Tensor
    """[b, s, g n], with the strides of C"""
    C: Tensor
    raw_steps: Tensor
    """[b, s, h], before bias, softplus and the limits."""
    bias: Tensor | None
    """[h] fp32"""
    A: Tensor
    """[h] fp32, negative"""
    D: Tensor | None
    """[h p] fp32"""
    documents: Tensor | None
    """[b, s] int32, contiguous: number of each token's document, not falling; the state restarts where it changes."""
    initial_states: Tensor | None
    """[b, h, p, n] fp32: the state before the first token, of the first document."""
    head_dim: int
    groups: int
    softplus: bool = True
    limits: tuple[float, float] = (0.0, float("inf"))

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """b, s, h, p, n, c"""
        b, s, width = self.x.shape
        state = self.B.shape[-1] // self.groups
        return b, s, width // self.head_dim, self.head_dim, state, triton.cdiv(s, CHUNK)


class Gradients(NamedTuple):
    """Where the backward pass writes: views like the inputs of the same names."""

    x: Tensor
    z: Tensor | None
    B: Tensor
    C: Tensor
    raw_steps: Tensor


def forward(scan: Scan, out: Tensor, want_final_states: bool = False) -> Tensor | None:
    """Writes the output, gated, to ``out`` [b, s, h p]; returns the final states [b, h, p, n] fp32 if they are wanted.

    Raises:
        ValueError: A dtype that the kernels do not have, or strides that they do not take.
    """
    _check(scan)
    b, _, h, p, n, c = scan.sizes
    steps, sums = _steps(scan)
    states = torch.empty(b, c, h, n, p, dtype=scan.x.dtype, device=scan.x.device)
    final = torch.empty(b, h, p, n, dtype=torch.float32, device=scan.x.device) if want_final_states else None
    _forward(scan, steps, sums, states, final)
    _output(scan, steps, sums, states, out)
    return final


def backward(
    scan: Scan, d_out: Tensor, to: Gradients, d_final: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Writes the gradients of ``to``'s tensors there; states are computed again.

    Args:
        d_out: [b, s, h p].
        d_final: Gradient of the final states, [b, h, p, n] fp32.

    Returns:
        Gradients of A [h], bias [h], D [h p] (all fp32) and the initial states (fp32, None without any).
    """
    b, s, h, p, n, c = scan.sizes
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=scan.x.device)  # noqa: E731
    steps, sums = _steps(scan)
    states, d_states = (empty(b, c, h, n, p, dtype=scan.x.dtype) for _ in range(2))
    d_first = empty(b, h, p, n) if scan.initial_states is not None else None
    _forward(scan, steps, sums, states)
    d_y = d_out
    if scan.z is not None:
        d_y = torch.empty(s, b, h * p, dtype=d_out.dtype, device=d_out.device).transpose(0, 1)
        _output(scan, steps, sums, states, d_y, d_out, to.z)
    d_whole = _backward(scan, d_y, sums, d_final, states, d_states, d_first)
    splits, receivers = _splits(scan, "scan_receivers")
    senders = _options(scan, "scan_senders")
    blocks, sender_blocks = (triton.cdiv(p, options["CHANNELS"]) for options in (receivers, senders))
    d_B, d_C = (empty(splits, b, c * CHUNK, scan.B.shape[-1]) for _ in range(2))
    d_scores = empty(splits, b, scan.groups, c, CHUNK, CHUNK)
    d_steps, d_rows, d_columns = (empty(v, b, h, c * CHUNK) for v in (blocks, blocks, sender_blocks))
    d_D = empty(b, c, h * p)
    documents, last = _or(scan.documents, sums), (s, h, c, b, splits)
    grid = (c, b, scan.groups * splits)
    aligned, rows = strides_in_loads(scan.x, scan.B, d_y)
    receivers_kernel[grid](
        scan.x, scan.B, scan.C, d_y, steps, sums, documents, states, d_C, d_scores, d_steps, d_rows, *rows, *last,
        ALIGNED=aligned, **_shared(scan), **receivers,
    )  # fmt: skip
    aligned, rows = strides_in_loads(scan.x, scan.B, d_y, to.x)
    senders_kernel[grid](
        scan.x, scan.B, scan.C, _or(scan.D, scan.A), d_y, steps, sums, documents, d_states, d_scores,
        to.x, d_B, d_D, d_columns, *rows, *last,
        HAS_D=scan.D is not None, ALIGNED=aligned, **_shared(scan), **senders,
    )  # fmt: skip
    for whole, part in ((to.B, d_B), (to.C, d_C)):
        whole.copy_((part[0] if splits == 1 else part.sum(0))[:, :s])  # [b, s, g n]
    d_A, d_bias = empty(b, c, h), empty(b, c, h)
    grid = (c, b, triton.cdiv(h, 16))
    steps_backward_kernel[grid](
        scan.raw_steps, _or(scan.bias, scan.A), scan.A, d_steps, d_rows, d_columns, d_whole, to.raw_steps, d_A, d_bias,
        *scan.raw_steps.stride()[:2], *to.raw_steps.stride()[:2], s, h, c, b, *scan.limits,
        BLOCKS=blocks, SENDER_BLOCKS=sender_blocks, SOFTPLUS=scan.softplus, HAS_BIAS=scan.bias is not None,
        CHUNK=CHUNK, HEADS=16,
    )  # fmt: skip
    return d_A.sum((0, 1)), d_bias.sum((0, 1)), d_D.sum((0, 1)), d_first


def _steps(scan: Scan) -> tuple[Tensor, Tensor]:
    """dt, and its running sum times A in each chunk, [b, h, c CHUNK] fp32."""
    b, s, h, _, _, c = scan.sizes
    steps, sums = torch.empty(2, b, h, c * CHUNK, dtype=torch.float32, device=scan.x.device)
    steps_kernel[(c, b, triton.cdiv(h, 16))](
        scan.raw_steps, _or(scan.bias, scan.A), scan.A, steps, sums,
        *scan.raw_steps.stride()[:2], s, h, c, *scan.limits,
        SOFTPLUS=scan.softplus, HAS_BIAS=scan.bias is not None, CHUNK=CHUNK, HEADS=16,
    )  # fmt: skip
    return steps, sums


def _forward(scan: Scan, steps: Tensor, sums: Tensor, states: Tensor, last: Tensor | None = None) -> None:
    """The forward walk: the state at each chunk's start to ``states`` [b, c, h, n, p].

    Args:
        last: If given, the final states go here, [b, h, p, n] fp32.
    """
    b, s, h, p, n, c = scan.sizes
    options = _options(scan, "scan_forward")
    aligned, rows = strides_in_loads(scan.x, scan.B)

    def walk(first: Tensor | None, last: Tensor | None, segments: int, stores: bool) -> None:
        states_kernel[(b * h * triton.cdiv(p, options["CHANNELS"]), segments)](
            scan.x, scan.B, steps, sums, _or(scan.documents, sums), _or(first, sums), states, _or(last, sums),
            *rows, s, h, c, b, triton.cdiv(c, segments),
            STORES=stores, HAS_FIRST=first is not None, HAS_LAST=last is not None, ALIGNED=aligned, **_shared(scan),
            **options,
        )  # fmt: skip

    segments = _segments(scan, options["CHANNELS"])
    if segments == 1:
        walk(scan.initial_states, last, 1, True)
        return
    ends = torch.empty(segments, b, h, p, n, dtype=torch.float32, device=states.device)
    walk(None, ends, segments, False)
    walk(_joined(scan, sums, ends, scan.initial_states), None if last is None else ends, segments, True)
    if last is not None:
        last.copy_(ends[-1])


def _output(
    scan: Scan, steps: Tensor, sums: Tensor, states: Tensor, out: Tensor, d_out: Tensor | None = None,
    d_z: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the output to ``out``; with ``d_out``, dout silu(z) to ``out`` and the gradient of z to ``d_z``."""
    backward = d_out is not None
    splits, options = _splits(scan, "scan_output_backward" if backward else "scan_output")
    b, s, h, _, _, c = scan.sizes
    z, d_out, d_z = _or(scan.z, scan.x), _or(d_out, out), _or(d_z, out)
    aligned, rows = strides_in_loads(scan.x, z, scan.B, out, d_out, d_z)
    output_kernel[(c, b, scan.groups * splits)](
        scan.x, z, scan.B, scan.C, _or(scan.D, scan.A), steps, sums, _or(scan.documents, sums), states,
        out, d_out, d_z, *rows, s, h, c, splits,
        HAS_Z=scan.z is not None, HAS_D=scan.D is not None, BACKWARD=backward, ALIGNED=aligned, **_shared(scan),
        **options,
    )  # fmt: skip


def _backward(
    scan: Scan, d_y: Tensor, sums: Tensor, d_final: Tensor | None, states: Tensor, d_states: Tensor,
    d_first: Tensor | None,
) -> Tensor:  # fmt: skip
    """The backward walk: the gradient of the state at each chunk's end to ``d_states`` [b, c, h, n, p].

    Args:
        d_final: [b, h, p, n] fp32.
        states: Of the forward walk.
        d_first: If given, the gradient of the initial states goes here, [b, h, p, n] fp32.

    Returns:
        decay S . dS of each chunk, [b, c, h] fp32.
    """
    b, s, h, p, n, c = scan.sizes
    options = _options(scan, "scan_backward")
    overlaps = torch.empty(b, c, h, p, dtype=torch.float32, device=d_y.device)
    aligned, rows = strides_in_loads(d_y, scan.C)

    def walk(first: Tensor | None, last: Tensor | None, segments: int, stores: bool) -> None:
        state_gradients_kernel[(b * h * triton.cdiv(p, options["CHANNELS"]), segments)](
            d_y, scan.C, sums, _or(scan.documents, sums), _or(first, sums), states, d_states, _or(last, sums), overlaps,
            *rows, s, h, c, b, triton.cdiv(c, segments),
            STORES=stores, HAS_FIRST=first is not None, HAS_LAST=last is not None, ALIGNED=aligned, **_shared(scan),
            **options,
        )  # fmt: skip

    segments = _segments(scan, options["CHANNELS"])
    if segments == 1:
        walk(d_final, d_first, 1, True)
        return overlaps.sum(-1)
    ends = torch.empty(segments, b, h, p, n, dtype=torch.float32, device=d_y.device)
    walk(None, ends, segments, False)
    walk(_joined(scan, sums, ends, d_final, backward=True), ends, segments, True)
    if d_first is not None:
        d_first.copy_(ends[0])
    return overlaps.sum(-1)


def _segments(scan: Scan, channels: int) -> int:
    """Into how many segments a walk is cut: with few sequences and heads, so many that they keep a GPU busy.

    Each is walked twice then, the first time for its last state alone: 8 chunks of it at least.
    """
    b, _, h, p, _, c = scan.sizes
    programs, segments = b * h * triton.cdiv(p, channels), 1
    while programs * segments < 200 and c >= 16 * segments:
        segments *= 2
    return segments


def _joined(scan: Scan, sums: Tensor, ends: Tensor, first: Tensor | None, backward: bool = False) -> Tensor:
    """The state that each segment starts from, of states ``ends`` after segments that all started from zero.

    ``first`` [b, h, p, n] goes into the first segment of the walk; ends and the result are [segments, b, h, p, n] fp32.
    """
    segments, (b, s, h, _, _, c) = len(ends), scan.sizes
    size = triton.cdiv(c, segments)
    bounds = [(k * size, min((k + 1) * size, c)) for k in range(segments)]
    whole = sums.view(b, h, c, CHUNK)[..., -1]  # of each chunk, [b, h, c]
    starts = torch.empty_like(ends)
    state = torch.zeros_like(ends[0]) if first is None else first
    for k in reversed(range(segments)) if backward else range(segments):
        starts[k] = state
        begin, end = bounds[k]
        decay = whole[..., begin:end].sum(-1).exp()  # [b, h]
        if scan.documents is not None:
            before, last = max(begin * CHUNK - 1, 0), min(end * CHUNK, s) - 1
            decay = decay * (scan.documents[:, before] == scan.documents[:, last])[:, None]
        state = torch.addcmul(ends[k], state, decay[..., None, None])
    return starts


def _shared(scan: Scan) -> dict[str, Any]:
    """The constants that all kernels of a scan have."""
    _, _, h, p, n, _ = scan.sizes
    return {
        "HEAD_DIM": p,
        "STATE": n,
        "GROUP": h // scan.groups,
        "HAS_DOCUMENTS": scan.documents is not None,
        "WHOLE_CHUNKS": scan.sizes[1] % CHUNK == 0,
        "PRECISION": "tf32x3" if scan.x.dtype == torch.float32 else "tf32",
        "CHUNK": CHUNK,
        "STATES": max(64, triton.next_power_of_2(n)),
        "DTYPE": _TYPES[scan.x.dtype],
    }


def _options(scan: Scan, kernel: str) -> dict[str, Any]:
    """A kernel's line of the table of configurations."""
    return launch_options(kernel, str(scan.x.element_size()))


def _splits(scan: Scan, kernel: str) -> tuple[int, dict[str, Any]]:
    """Into how many programs the heads of a group are split, and the kernel's configuration.

    Programs share C B^T only within a split: no more of them than keep a GPU busy, and as many heads in each.
    """
    b, _, h, p, n, c = scan.sizes
    options = _options(scan, kernel)
    wanted = options.pop("PROGRAMS")
    splits = 1
    while b * c * scan.groups * splits < wanted and h // scan.groups % (2 * splits) == 0:
        splits *= 2
    return splits, options


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor for a pointer that the kernel does not read."""
    return other if tensor is None else tensor


def _check(scan: Scan) -> None:
    if scan.x.dtype not in _TYPES:
        raise ValueError(
            f"the scan's Triton kernels take float32, bfloat16 or float16, not {scan.x.dtype}; use --ssm-kernels torch"
        )
    for name in ("x", "z", "B", "C", "raw_steps"):
        tensor = getattr(scan, name)
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")
    for name in ("bias", "A", "D", "documents", "initial_states"):
        tensor = getattr(scan, name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
