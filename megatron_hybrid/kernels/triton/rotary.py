"""Heads of attention out of the columns of a projection, with RoPE, in Triton: one kernel each way.

Each program takes rows of heads of one kind (Q, K or V) and moves them between the projection and the tensor of these
heads, so that each value is read once and written once. The backward pass is the same kernel with source and target
exchanged and the turn reversed.

Shape letters: s tokens, b samples, n query heads, g key heads, gv value heads, d head size of Q and K, dv head size of
V, r channels of a head that RoPE turns, w columns of the projection.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.kernels.columns import GradientPlace
from megatron_hybrid.kernels.head_columns import HeadColumns, Turns
from megatron_hybrid.kernels.triton.configs import launch_options


@triton.jit
def move_heads(
    x, heads, table, block, tokens,
    SAMPLES: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, GROUP_COLUMNS: tl.constexpr, FIRST: tl.constexpr,
    EACH: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, B: tl.constexpr, H: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS heads of WIDTH channels, of which the first 2 PAIRS are turned; from ``heads`` to ``x`` if BACK.

    Row i is head i % (GROUPS EACH) of token i // (GROUPS EACH). In x, a group's heads of this kind begin at column
    FIRST. S, B and H are the strides of ``heads`` over positions, samples and heads.
    """
    i = block * ROWS + tl.arange(0, ROWS)
    token, head = i // (GROUPS * EACH), i % (GROUPS * EACH)
    position, sample = token // SAMPLES, token % SAMPLES
    inside = (token < tokens)[:, None]
    column = (head // EACH) * GROUP_COLUMNS + FIRST + (head % EACH) * WIDTH
    in_x = (x + token.to(tl.int64) * ROW + column)[:, None]
    in_heads = (heads + position.to(tl.int64) * S + sample.to(tl.int64) * B + head.to(tl.int64) * H)[:, None]
    if BACK:
        source, target = in_heads, in_x
    else:
        source, target = in_x, in_heads
    if PAIRS > 0:
        c = tl.arange(0, PAIR_BLOCK)[None, :]
        there = inside & (c < PAIRS)
        at = table + position[:, None] * (2 * PAIRS) + c
        cos = tl.load(at, there, other=0.0)
        sin = tl.load(at + PAIRS, there, other=0.0)
        if BACK:
            sin = -sin
        if INTERLEAVED:
            both = tl.arange(0, 2 * PAIR_BLOCK)[None, :]
            both_there = inside & (both < 2 * PAIRS)
            wide = tl.load(source + both, both_there, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(wide, (ROWS, PAIR_BLOCK, 2)))
            turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * PAIR_BLOCK))
            tl.store(target + both, turned.to(target.dtype.element_ty), both_there)
        else:
            a = tl.load(source + c, there, other=0.0).to(tl.float32)
            b = tl.load(source + PAIRS + c, there, other=0.0).to(tl.float32)
            tl.store(target + c, (a * cos - b * sin).to(target.dtype.element_ty), there)
            tl.store(target + PAIRS + c, (b * cos + a * sin).to(target.dtype.element_ty), there)
    if 2 * PAIRS < WIDTH:
        c = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
        there = inside & (c < WIDTH)
        tl.store(target + c, tl.load(source + c, there), there)


@triton.jit(do_not_specialize=["tokens", "query_programs", "key_programs"])
def rotary_kernel(
    x, q, k, v, table, tokens, query_programs, key_programs,
    SAMPLES: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QS: tl.constexpr, QB: tl.constexpr, QH: tl.constexpr, KS: tl.constexpr, KB: tl.constexpr, KH: tl.constexpr,
    VS: tl.constexpr, VB: tl.constexpr, VH: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr, MOVE_VALUES: tl.constexpr,
    ROWS: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    VALUE_ROWS: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """x [s, b, w] to q [s, b, n, d], k [s, b, g, d] and, with MOVE_VALUES, v [s, b, gv, dv]; or back.

    ``table`` [s, 2, PAIRS] fp32: cosines and sines. The first programs move queries, the next keys, the rest values.
    """
    columns: tl.constexpr = (QUERIES + KEYS) * WIDTH + VALUES * VALUE_WIDTH
    program = tl.program_id(0)
    if program < query_programs:
        move_heads(x, q, table, program, tokens, SAMPLES, ROW, GROUPS, columns, 0, QUERIES, WIDTH, QS, QB, QH,
                   PAIRS, INTERLEAVED, BACK, ROWS, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    elif program < query_programs + key_programs:
        move_heads(x, k, table, program - query_programs, tokens, SAMPLES, ROW, GROUPS, columns, QUERIES * WIDTH, KEYS,
                   WIDTH, KS, KB, KH, PAIRS, INTERLEAVED, BACK, ROWS, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    elif MOVE_VALUES:
        move_heads(x, v, table, program - query_programs - key_programs, tokens, SAMPLES, ROW, GROUPS, columns,
                   (QUERIES + KEYS) * WIDTH, VALUES, VALUE_WIDTH, VS, VB, VH, 0, False, BACK, VALUE_ROWS, 1,
                   VALUE_BLOCK)  # fmt: skip


def split_and_rotate(
    x: Tensor, heads: HeadColumns, turns: Turns | None, copy_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [s, b, w] to q [s, b, n, d], k [s, b, g, d], v [s, b, gv, dv]: ``kernels/qkv_rotation.py`` says more."""
    if _row(x) is None:
        x = x.contiguous()
    table, interleaved = (None, False) if turns is None else turns
    return _SplitAndRotate.apply(x, table, heads, interleaved, copy_values, GradientPlace(x))


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor | None, heads: HeadColumns, interleaved: bool, copy_values: bool,
        place: GradientPlace,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(table)
        ctx.heads, ctx.interleaved, ctx.place = heads, interleaved, place
        s, b, _ = x.shape
        q = x.new_empty(s, b, heads.groups * heads.queries, heads.width)
        k = x.new_empty(s, b, heads.groups * heads.keys, heads.width)
        if copy_values:
            v = x.new_empty(s, b, heads.groups * heads.values, heads.value_width)
            _launch(x, q, k, v, table, heads, interleaved, False)
            return q, k, v
        _launch(x, q, k, None, table, heads, interleaved, False)
        # [s, b, groups, columns of a group] to views of their last columns
        values = x.unflatten(-1, (heads.groups, -1))[..., (heads.queries + heads.keys) * heads.width :]
        values = values.unflatten(-1, (heads.values, -1))  # [s, b, groups, values, dv]
        return q, k, values.squeeze(2) if heads.groups == 1 else values.squeeze(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        dx = ctx.place.make()  # [s, b, w]
        dq, dk, dv = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk, dv))
        _launch(dx, dq, dk, dv, table, ctx.heads, ctx.interleaved, True)
        return dx, None, None, None, None, None


def _row(x: Tensor) -> int | None:
    """Elements from one token of one sample to the next, [s, b, w] read as [s b, w]; None if it is no such tensor."""
    (s, b, _), (over_s, over_b, over_w) = x.shape, x.stride()
    if over_w != 1 or (s > 1 and b > 1 and over_s != b * over_b):
        return None
    return over_b if b > 1 else over_s


def _launch(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor | None, table: Tensor | None, heads: HeadColumns, interleaved: bool,
    back: bool,
) -> None:  # fmt: skip
    s, b, _ = x.shape
    if x.numel() == 0:
        return
    tiles = tile(heads, 0 if table is None else table.shape[2], x.element_size())
    rows, value_rows = tiles["ROWS"], tiles["VALUE_ROWS"]
    counts = [triton.cdiv(s * b * t.shape[2], rows) for t in (q, k)]
    values = 0 if v is None else triton.cdiv(s * b * v.shape[2], value_rows)
    strides = dict(zip(("QS", "QB", "QH", "KS", "KB", "KH"), (*q.stride()[:3], *k.stride()[:3]), strict=True))
    strides |= dict(zip(("VS", "VB", "VH"), (0, 0, 0) if v is None else v.stride()[:3], strict=True))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        rotary_kernel[(sum(counts) + values,)](
            x, q, k, v, table, s * b, *counts, SAMPLES=b, ROW=_row(x), GROUPS=heads.groups, QUERIES=heads.queries,
            KEYS=heads.keys, VALUES=heads.values, WIDTH=heads.width, VALUE_WIDTH=heads.value_width, **strides,
            INTERLEAVED=interleaved, BACK=back, MOVE_VALUES=v is not None, **tiles,
        )  # fmt: skip


def tile(heads: HeadColumns, pairs: int, size: int) -> dict[str, int]:
    """Rows and channels of a program, as arguments of the kernel's launch.

    Args:
        heads: Of the projection.
        pairs: Channels that RoPE turns, r/2.
        size: Bytes of an element.
    """
    line = launch_options("rotary", str(size))
    elements = line.pop("ELEMENTS")
    pair_block, value_block = triton.next_power_of_2(max(pairs, 1)), triton.next_power_of_2(heads.value_width)
    rest_block = triton.next_power_of_2(max(heads.width - 2 * pairs, 1))
    wide = max(2 * pair_block if pairs else 1, rest_block)
    return {
        "PAIRS": pairs,
        "ROWS": max(1, elements // wide),
        "PAIR_BLOCK": pair_block,
        "REST_BLOCK": rest_block,
        "VALUE_ROWS": max(1, elements // value_block),
        "VALUE_BLOCK": value_block,
        **line,
    }
