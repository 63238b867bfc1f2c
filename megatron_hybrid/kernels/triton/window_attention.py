"""Causal attention in Triton: full or with a window and sinks, inside documents, grouped queries, V of any width.

Flash attention (Dao, arXiv:2307.08691) whose loops pass over the visible blocks of keys alone: first the sinks, then
the window. Blocks without a hidden pair need no mask. Each gradient is added up in one program in a fixed order, so
that two backward passes agree in every bit. Tensors [b, heads, s, width] are read and written through their strides by
the Tensor Memory Accelerator where there is one.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .window_attention_backward import key_value_gradients, query_gradients, sink_gradients
from .window_attention_forward import forward

WIDEST = 256
"""Channels of a head."""


class Blocks(NamedTuple):
    """Queries (of all heads that a program takes) and keys of a block; warps of a program; blocks in flight."""

    m: int
    n: int
    warps: int
    stages: int


BLOCKS: dict[str, dict[int, Blocks]] = {
    "forward": {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(128, 32, 8, 2)},
    "query_gradients": {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    "key_value_gradients": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 1)},
}
"""By kernel and by the greatest width of a head up to which they are taken
(``tools/benchmarks/attention.py --search`` compares others)."""

CHUNK = 512
"""Queries whose gradients of sinks are added up by one program: a multiple of every block."""


class Rule(NamedTuple):
    """Which keys a query sees, and the scale of the scores (``kernels/attention.py``)."""

    scale: float
    window: int | None
    sinks: int
    offset: int


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, starts: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """Attention of queries at ``offset, offset + 1, ...`` to the keys up to each; differentiable in q, k and v.

    Args:
        q: [b, h, sq, d], bf16 or fp16 (fp32 in Triton's interpreter alone), d and dv multiples of 8 up to 256.
        k: [b, hk, offset + sq, d]; h a multiple of hk.
        v: [b, hk, offset + sq, dv].
        rule: Scale above zero, window, sinks, offset.
        starts: [b, at least offset + sq] int32: the first position of each position's document, or None for one.
        ends: The same: the position behind each position's document.

    Returns:
        [b, h, sq, dv] in the memory order [sq, b, h, dv].
    """
    return _WindowAttention.apply(q, k, v, rule, starts, ends)


def blocks(kernel: str, d: int, dv: int) -> Blocks:
    """The table's row for these widths."""
    rows = BLOCKS[kernel]
    return rows[min(width for width in rows if width >= max(d, dv))]


def parts(width: int) -> tuple[int, int]:
    """A width as one or two tiles of powers of two, at least 16 each; the second is 0 where one is enough."""
    whole = 1 << (width.bit_length() - 1)
    rest = width - whole
    second = max(16, triton.next_power_of_2(rest))
    if rest == 0:
        return max(whole, 16), 0
    return (whole, second) if second < whole else (max(2 * whole, 16), 0)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule, starts: Tensor | None, ends: Tensor | None
    ) -> Tensor:
        q, k, v = (_addressable(t) for t in (q, k, v))
        (b, h, sq, d), dv = q.shape, v.shape[-1]
        out = _empty(b, h, sq, dv, q)
        # [b, h, sq] fp32 in rows of whole 16 bytes
        lse = torch.empty(b, h, -(-sq // 4) * 4, device=q.device, dtype=torch.float32)[..., :sq]
        block, pack = blocks("forward", d, dv), _pack(h // k.shape[1])
        rows = block.m // pack
        with _device(q):
            forward[(triton.cdiv(sq, rows), b * h // pack)](
                *_tiles(q, pack, rows), *_tiles(k, 1, block.n), *_tiles(v, 1, block.n), *_tiles(out, pack, rows),
                lse, *_shape(rule, q, k, lse, starts), lse.stride(1), rule.scale * math.log2(math.e),
                *parts(d), *parts(dv), *_kind(rule, starts), pack, block.m, block.n,
                num_warps=block.warps, num_stages=block.stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, starts, ends)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        q, k, v, out, lse, starts, ends = ctx.saved_tensors
        grad = _addressable(grad)
        delta = torch.empty_strided(lse.shape, lse.stride(), device=lse.device, dtype=lse.dtype)
        with _device(q):
            dq = _query_gradients(ctx.rule, q, k, v, out, grad, lse, delta, starts)  # fills delta
            dk, dv = _key_value_gradients(ctx.rule, q, k, v, grad, lse, delta, starts, ends)
        return dq, dk, dv, None, None, None


def _query_gradients(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    starts: Tensor | None,
) -> Tensor:  # fmt: skip
    (b, h, sq, d), dv = q.shape, v.shape[-1]
    block, pack = blocks("query_gradients", d, dv), _pack(h // k.shape[1])
    rows = block.m // pack
    dq = _empty(*q.shape, q)
    query_gradients[(triton.cdiv(sq, rows), b * h // pack)](
        *_tiles(q, pack, rows), *_tiles(k, 1, block.n), *_tiles(v, 1, block.n), *_tiles(out, pack, rows),
        *_tiles(grad, pack, rows), *_tiles(dq, pack, rows),
        lse, delta, *_shape(rule, q, k, lse, starts), lse.stride(1), rule.scale, rule.scale * math.log2(math.e),
        *parts(d), *parts(dv), *_kind(rule, starts), pack, block.m, block.n,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return dq


def _key_value_gradients(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    starts: Tensor | None, ends: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, hk, sk, d), dv = k.shape, v.shape[-1]
    block, width = blocks("key_value_gradients", d, dv), (*parts(d), *parts(dv))
    tiles = [*_tiles(q, 1, block.m), *_tiles(k, 1, block.n), *_tiles(v, 1, block.n), *_tiles(grad, 1, block.m)]
    rows = [_tile(t, [1, 1, block.m]) for t in (lse, delta)]
    first, *shape = _shape(rule, q, k, lse, starts)
    shape = [first, lse if ends is None else ends, *shape]
    factor = rule.scale * math.log2(math.e)
    launch = {"num_warps": block.warps, "num_stages": block.stages}
    windowed, sinks, documents = _kind(rule, starts)
    partial = [None] * 4
    if sinks:
        chunks, sink_blocks = triton.cdiv(sk, CHUNK), triton.cdiv(rule.sinks, block.n)
        sums = lse.new_empty(b * hk * chunks, sink_blocks * block.n, sum(width))
        partial = [_tile(sums, [1, block.n, part]) if part else None for part in width]
        sink_gradients[(chunks, sink_blocks, b * hk)](
            *tiles, *partial, *rows, *shape, factor, *width, documents, CHUNK, block.m, block.n, **launch
        )
    dk, d_v = _empty(*k.shape, k), _empty(*v.shape, v)
    key_value_gradients[(triton.cdiv(sk, block.n), b * hk)](
        *tiles, *_tiles(dk, 1, block.n), *_tiles(d_v, 1, block.n), *partial, *rows,
        *shape, rule.scale, factor,
        *width, windowed, sinks, documents, CHUNK, block.m, block.n, **launch,
    )  # fmt: skip
    return dk, d_v


def _shape(rule: Rule, q: Tensor, k: Tensor, unused: Tensor, starts: Tensor | None) -> list:
    """Arguments that all kernels have: starts, sq, offset, length, window, sinks, heads, groups."""
    length = 0 if starts is None else starts.shape[1]
    heads = q.shape[1]
    first = unused if starts is None else starts
    return [first, q.shape[2], rule.offset, length, rule.window or 0, rule.sinks, heads, heads // k.shape[1]]


def _kind(rule: Rule, starts: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether there are a window, sinks, documents."""
    return rule.window is not None, rule.window is not None and rule.sinks > 0, starts is not None


def _pack(groups: int) -> int:
    """Query heads of a program, of ``groups`` that read the same keys: the greatest power of two, up to 8."""
    return min(groups & -groups, 8)


def _empty(b: int, h: int, s: int, width: int, like: Tensor) -> Tensor:
    """[b, h, s, width], stored as [s, b, h, width]."""
    return torch.empty(s, b, h, width, device=like.device, dtype=like.dtype).permute(1, 2, 0, 3)


def _addressable(t: Tensor) -> Tensor:
    """The tensor, or a copy where its addresses and strides are no multiples of 16 bytes."""
    aligned = all(n * t.element_size() % 16 == 0 and n > 0 for n, size in zip(t.stride()[:-1], t.shape, strict=False))
    if aligned and t.stride(-1) == 1 and t.data_ptr() % 16 == 0:
        return t
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def _tiles(t: Tensor, heads: int, rows: int) -> list[TensorDescriptor | None]:
    """Descriptors of both parts of a tensor's width: blocks of ``rows`` rows of ``heads`` heads."""
    return [_tile(t, [1, heads, rows, width]) if width else None for width in parts(t.shape[-1])]


def _tile(t: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def _device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
