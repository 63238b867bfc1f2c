"""Rows of tokens into the order of experts and back, in Triton: every sum in a fixed order, no atomics, no waiting.

Shape letters: t tokens, e experts, n rows (pairs of a token and one of its experts), h channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def _count(routing, counts, tokens, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of each expert in a block of tokens: routing [t, e] to counts [e, blocks]."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, WIDTH)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    chosen = tl.load(routing + t.to(tl.int64)[:, None] * EXPERTS + e[None, :], there, other=0).to(tl.int32)
    tl.store(counts + e * tl.num_programs(0) + block, tl.sum(chosen, 0), e < EXPERTS)


@triton.jit(do_not_specialize=["tokens", "limit"])
def _place(
    routing,
    probabilities,
    counts,
    ends,
    pairs,
    rows,
    rows_of_token,
    sorted_probabilities,
    tokens,
    limit,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Gives each pair of a token and an expert its row; counts and ends are [e, blocks], ends the sums up to each."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, WIDTH)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    pair = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    chosen = tl.load(routing + pair, there, other=0).to(tl.int32)
    of_block = e * tl.num_programs(0) + block
    end = tl.load(ends + of_block, e < EXPERTS, other=0)
    start = end - tl.load(counts + of_block, e < EXPERTS, other=0)
    row = start[None, :] + tl.cumsum(chosen, 0) - chosen
    placed = (chosen > 0) & (row < limit)
    tl.store(pairs + row, pair.to(tl.int32), placed)
    slot = tl.cumsum(placed.to(tl.int32), 1) - placed.to(tl.int32)
    tl.store(rows + t.to(tl.int64)[:, None] * EXPERTS + slot, row, placed)
    tl.store(rows_of_token + t, tl.sum(placed.to(tl.int32), 1), t < tokens)
    if WEIGHTED:
        tl.store(sorted_probabilities + row, tl.load(probabilities + pair, placed, other=0.0), placed)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows(
    x,
    index,
    counts,
    out,
    rows,
    width,
    x_stride,
    index_stride,
    DIVISOR: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = sum over j < counts[r] of x[index[r, j] // DIVISOR], in the order of j and in fp32; without counts 1."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    within = (c < width)[None, :]
    at = r.to(tl.int64)
    if COUNTED:
        count = tl.load(counts + r, inside, other=0)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for j in range(tl.max(count, 0)):
            here = j < count
            source = (tl.load(index + at * index_stride + j, here, other=0) // DIVISOR).to(tl.int64)
            total += tl.load(x + source[:, None] * x_stride + c[None, :], here[:, None] & within, other=0.0).to(
                tl.float32
            )
    else:
        source = (tl.load(index + at * index_stride, inside, other=0) // DIVISOR).to(tl.int64)
        total = tl.load(x + source[:, None] * x_stride + c[None, :], inside[:, None] & within, other=0.0)
    tl.store(out + at[:, None] * width + c[None, :], total.to(out.dtype.element_ty), inside[:, None] & within)


def place_rows(routing: Tensor, probabilities: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """Sorts pairs of a token and an expert by expert, and those of an expert by token, by counting.

    Args:
        routing: [t, e] bool, contiguous: which experts a token is routed to.
        probabilities: [t, e], or None.
        n: Rows; what would come behind them is left out.

    Returns:
        The map, int32 [n + t e + t] (``expert_rows.parts_of``): ``token * e + expert`` of each row; the rows of each
        token by expert, in the first of its e entries, the others not set; and their number. And the probabilities of
        the rows [n], or None.
    """
    tokens, experts = routing.shape
    new = {"dtype": torch.int32, "device": routing.device}
    row_map = torch.empty(n + tokens * (experts + 1), **new)
    pairs, rows, number = row_map.split([n, tokens * experts, tokens])
    pairs.zero_()  # so that a row that no pair has reads some token, and not memory that is not there
    found = None
    if probabilities is not None:
        probabilities = probabilities.contiguous()
        found = torch.zeros(n, dtype=probabilities.dtype, device=routing.device)
    if not tokens:
        return row_map, found
    width = triton.next_power_of_2(experts)
    block = max(16, min(512, 4096 // width))
    blocks = triton.cdiv(tokens, block)
    counts = torch.empty(experts, blocks, **new)
    shape = {"EXPERTS": experts, "WIDTH": width, "BLOCK": block}
    bits = routing.view(torch.uint8)
    _count[(blocks,)](bits, counts, tokens, **shape)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    _place[(blocks,)](
        bits, probabilities, counts, ends, pairs, rows, number, found, tokens, n, **shape, WEIGHTED=found is not None
    )
    return row_map, found


def sum_rows(x: Tensor, index: Tensor, counts: Tensor | None = None, divisor: int = 1) -> Tensor:
    """Sums of chosen rows, each in the order of its list and in fp32, rounded once.

    Args:
        x: [m, h], its channels side by side.
        index: [r, k] int32: ``divisor`` times the rows to be summed, or a little more.
        counts: [r] int32: how many entries of each list count; None for one.
        divisor: Of the entries of index.

    Returns:
        [r, h], of the type of x.
    """
    rows, width = len(index), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not rows or not width:
        return out
    block = min(1024, triton.next_power_of_2(width))
    each = max(1, 4096 // block)
    grid = (triton.cdiv(rows, each), triton.cdiv(width, block))
    _sum_rows[grid](
        x,
        index,
        counts,
        out,
        rows,
        width,
        x.stride(0),
        index.stride(0),
        DIVISOR=divisor,
        COUNTED=counts is not None,
        ROWS=each,
        BLOCK=block,
    )
    return out
