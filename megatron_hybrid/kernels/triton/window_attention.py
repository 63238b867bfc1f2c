"""Causal attention in Triton: full or with a window and sinks, inside documents, grouped queries, V of any width.

Flash attention (Dao, arXiv:2307.08691) whose loops pass over the visible blocks of keys alone: first the sinks, then
the window. Blocks without a hidden pair need no mask. Each gradient is added up in one program in a fixed order, so
that two backward passes agree in every bit. Tensors [b, heads, s, width] are read and written through their strides: by
the Tensor Memory Accelerator where there is one, but for the queries of a program and what belongs to them.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_hybrid.kernels.alignment import addressable
from megatron_hybrid.kernels.triton.configs import launch_options
from megatron_hybrid.kernels.triton.window_attention_backward import (
    attention_key_value_gradients,
    attention_query_gradients,
    attention_sink_gradients,
)
from megatron_hybrid.kernels.triton.window_attention_forward import attention_forward

CHUNK = 512
"""Queries whose gradients of sinks are added up by one program: a multiple of every block of keys."""


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
        rule: Scale, window, sinks, offset.
        starts: [b, at least offset + sq] int32: the first position of each position's document, or None for one.
        ends: The same: the position behind each position's document.

    Returns:
        [b, h, sq, dv] in the memory order [sq, b, h, dv].

    Raises:
        ValueError: The scale is not above zero: the greatest score would not be that of the greatest product.
    """
    if not rule.scale > 0:
        raise ValueError(f"scale is {rule.scale:g} and must be above 0")
    return _WindowAttention.apply(q, k, v, rule, starts, ends)


def shape_class(d: int, dv: int) -> str:
    """The class of head sizes in the table of configurations."""
    return str(next(width for width in (64, 128, 256) if width >= max(d, dv)))


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
        q, k, v = (addressable(t) for t in (q, k, v))
        (b, h, sq, d), dv = q.shape, v.shape[-1]
        out = _empty(q, dv)
        # [b, h, sq] fp32 in rows of whole 16 bytes
        lse = torch.empty(b, h, -(-sq // 4) * 4, device=q.device, dtype=torch.float32)[..., :sq]
        line, pack = launch_options("attention_forward", shape_class(d, dv)), _pack(h // k.shape[1])
        rows, keys = line["BLOCK_M"] // pack, line["BLOCK_N"]
        with _device(q):
            attention_forward[(triton.cdiv(sq, rows), b * h // pack)](
                q, *q.stride()[:3], *_tiles(k, 1, keys), *_tiles(v, 1, keys), *_tiles(out, pack, rows),
                lse, *_shape(rule, q, k, lse, starts), lse.stride(1), rule.scale * math.log2(math.e),
                d, *parts(d), *parts(dv), *_kind(rule, starts), pack, **line,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, starts, ends)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, out, lse, starts, ends = ctx.saved_tensors
        grad = addressable(grad)
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
    line, pack = launch_options("attention_query_gradients", shape_class(d, dv)), _pack(h // k.shape[1])
    rows, keys = line["BLOCK_M"] // pack, line["BLOCK_N"]
    dq = _empty(q, d)
    attention_query_gradients[(triton.cdiv(sq, rows), b * h // pack)](
        q, *q.stride()[:3], out, *out.stride()[:3], grad, *grad.stride()[:3],
        *_tiles(k, 1, keys), *_tiles(v, 1, keys), *_tiles(dq, pack, rows),
        lse, delta, *_shape(rule, q, k, lse, starts), lse.stride(1), rule.scale, rule.scale * math.log2(math.e),
        d, *parts(d), dv, *parts(dv), *_kind(rule, starts), pack, **line,
    )  # fmt: skip
    return dq


def _key_value_gradients(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    starts: Tensor | None, ends: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, hk, sk, d), dv = k.shape, v.shape[-1]
    width, named = (*parts(d), *parts(dv)), shape_class(d, dv)
    first, *shape = _shape(rule, q, k, lse, starts)
    shape = [first, lse if ends is None else ends, *shape]
    factor = rule.scale * math.log2(math.e)
    windowed, sinks, documents = _kind(rule, starts)

    def read(line: dict[str, int]) -> tuple[list, list]:
        m, n = line["BLOCK_M"], line["BLOCK_N"]
        tiles = [*_tiles(q, 1, m), *_tiles(k, 1, n), *_tiles(v, 1, n), *_tiles(grad, 1, m)]
        return tiles, [_tile(t, [1, 1, m]) for t in (lse, delta)]

    sums = None
    if sinks:
        line = launch_options("attention_sink_gradients", named)
        (tiles, rows), n = read(line), line["BLOCK_N"]
        chunks, blocks = triton.cdiv(sk, CHUNK), triton.cdiv(rule.sinks, n)
        sums = lse.new_empty(b * hk * chunks, blocks * n, sum(width))
        attention_sink_gradients[(chunks, blocks, b * hk)](
            *tiles, *_partial(sums, n, width), *rows, *shape, factor, *width, documents, CHUNK, **line
        )
    line = launch_options("attention_key_value_gradients", named)
    (tiles, rows), n = read(line), line["BLOCK_N"]
    dk, d_v = _empty(k, d), _empty(v, dv)
    attention_key_value_gradients[(triton.cdiv(sk, n), b * hk)](
        *tiles, *_tiles(dk, 1, n), *_tiles(d_v, 1, n), *_partial(sums, n, width), *rows,
        *shape, rule.scale, factor, *width, windowed, sinks, documents, CHUNK, **line,
    )  # fmt: skip
    return dk, d_v


def _partial(sums: Tensor | None, rows: int, width: tuple[int, ...]) -> list[TensorDescriptor | None]:
    """Descriptors of the partial sums of the sinks' gradients: both parts of K's and of V's."""
    return [_tile(sums, [1, rows, part]) if sums is not None and part else None for part in width]


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


def _empty(like: Tensor, width: int) -> Tensor:
    """[b, h, s, width] of a tensor's b, h and s, stored as [s, b, h, width]."""
    b, h, s, _ = like.shape
    return torch.empty(s, b, h, width, device=like.device, dtype=like.dtype).permute(1, 2, 0, 3)


def _tiles(t: Tensor, heads: int, rows: int) -> list[TensorDescriptor | None]:
    """Descriptors of both parts of a tensor's width: blocks of ``rows`` rows of ``heads`` heads."""
    return [_tile(t, [1, heads, rows, width]) if width else None for width in parts(t.shape[-1])]


def _tile(t: Tensor, block: list[int]) -> TensorDescriptor:
    strides = [n if size > 1 else 16 for n, size in zip(t.stride()[:-1], t.shape, strict=False)]  # that of one is free
    return TensorDescriptor(t, list(t.shape), [*strides, 1], block)


def _device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
