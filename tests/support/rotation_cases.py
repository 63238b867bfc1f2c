"""Projections of attention, split and turned: cases, Megatron's own operations, and the errors of ours."""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels.columns import split_columns
from megatron_hybrid.kernels.head_columns import HeadColumns, Turns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, turns_of

LAYOUTS = {
    "grouped": HeadColumns(groups=2, queries=3, keys=1, values=1, width=16, value_width=16),
    "one-group": HeadColumns(groups=1, queries=4, keys=1, values=1, width=8, value_width=8),
    "parts": HeadColumns(groups=1, queries=4, keys=2, values=2, width=12, value_width=24),
    "values-of-queries": HeadColumns(groups=1, queries=3, keys=1, values=3, width=10, value_width=5),
}
# one rounding of outputs of about the largest entry's size: 8 bits, 11 bits; fp32 keeps a few roundings of 2^-24
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def angles(length: int, channels: int, interleaved: bool, base: float = 100.0) -> Tensor:
    """As ``RotaryEmbedding`` makes them: [s, 1, 1, r]."""
    rates = base ** -(torch.arange(0, channels, 2) / channels)
    of_pairs = torch.arange(length)[:, None] * rates  # [s, r/2]
    whole = of_pairs.repeat_interleave(2, 1) if interleaved else of_pairs.repeat(1, 2)
    return whole[:, None, None]


def upstreams(x: Tensor, heads: HeadColumns, turn: Tensor | None, interleaved: bool, factor: float) -> tuple:
    """What Megatron does: one split for all groups, RoPE on Q and on K (core/transformer/attention.py:1878)."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    grouped = x.unflatten(-1, (heads.groups, -1))
    widths = [heads.queries * heads.width, heads.keys * heads.width, heads.values * heads.value_width]
    sizes = (heads.width, heads.width, heads.value_width)
    parts = [part.reshape(*x.shape[:2], -1, size) for part, size in zip(grouped.split(widths, -1), sizes, strict=True)]
    if turn is None:
        return tuple(parts)
    turned = (_apply_rotary_pos_emb_bshd(t, turn, rotary_interleaved=interleaved, mscale=factor) for t in parts[:2])
    return (*turned, parts[2])


def errors(
    heads: HeadColumns,
    length: int,
    batch: int,
    dtype: torch.dtype,
    channels: int | None = None,
    interleaved: bool = False,
    factor: float = 1.0,
    copy_values: bool = True,
    inside: tuple[int, int] | None = None,
    device: str = "cpu",
    samples_first: bool = False,
) -> dict[str, float]:
    """Of q, k, v and the projection's gradient against Megatron's operations in float64, by their largest entry.

    Args:
        heads: Where heads stand.
        length: s.
        batch: b.
        dtype: Of the projection.
        channels: That RoPE turns; None: all of Q and K, 0: none.
        interleaved: How pairs stand.
        factor: Of turned channels.
        copy_values: As ``split_and_rotate`` has it.
        inside: The projection is columns of a wider one, with as many before and behind it.
        device: Where ours runs.
        samples_first: The gradients of the heads come in the memory order [b, heads, s, d].
    """
    generator = torch.Generator().manual_seed(0)
    channels = heads.width if channels is None else channels
    turn = angles(length, channels, interleaved) if channels else None
    before, behind = inside or (0, 0)
    whole = torch.randn(length, batch, before + heads.columns + behind, generator=generator).to(dtype)
    ours, exact = whole.to(device, copy=True).requires_grad_(), whole.double().requires_grad_()
    wide = 1 * ours
    seen: list[Tensor] = []
    wide.register_hook(seen.append)
    own = split_columns(wide, [before, heads.columns, behind])[1] if inside else wide
    turns: Turns | None = None if turn is None else turns_of(turn.to(device), interleaved, factor)
    found = split_and_rotate(own, heads, turns, copy_values)
    narrow = exact[..., before : before + heads.columns]
    wanted = upstreams(narrow, heads, None if turn is None else turn.double(), interleaved, factor)
    gradients = [torch.randn(t.shape, generator=generator).to(dtype) for t in wanted]

    def given(d: Tensor) -> Tensor:
        d = d.to(device)
        return d.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) if samples_first else d

    torch.autograd.backward(found, [given(d) for d in gradients])
    torch.autograd.backward(wanted, [d.double() for d in gradients])
    pairs: dict[str, tuple[Any, Any]] = dict(zip("qkv", zip(found, wanted, strict=True), strict=True))
    pairs["dx"] = seen[0], exact.grad
    result = {}
    for name, (got, want) in pairs.items():
        assert got.shape == want.shape and got.dtype == dtype, name
        result[name] = float((got.detach().cpu().double() - want.detach()).abs().max() / want.detach().abs().max())
    return result
