"""Where the attention-bearing blocks of a model stand: from a number of blocks and a ratio to a pattern.

A *block* is the paper's unit: a mixer and its feed-forward layer, two characters of a pattern.

This module imports neither torch nor Megatron.
"""

from typing import Literal, get_args

from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import Pattern, symbols_of

Placement = Literal["scatter", "cluster", "sandwich", "front", "middle", "end"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)

PAPER_SETS: dict[tuple[int, int, str], tuple[int, ...]] = {
    (13, 7, "scatter"): (2, 4, 6, 8, 10, 12, 13),
    (13, 2, "middle"): (4, 8),
    (13, 2, "end"): (4, 11),
    (16, 4, "front"): (1, 4, 7, 10),
}
"""The paper's own sets that follow no rule, by (blocks, attention blocks, placement).

Every other set of the paper comes out of the rules in :func:`attention_blocks`. ``front`` moves
the first block of ``middle``, so (13, 2, "front") = (1, 8) follows from the entry for ``middle``.
"""


def attention_count(num_blocks: int, ratio: str) -> int:
    """How many of ``num_blocks`` blocks bear attention at a ratio such as ``1:5``.

    The nearest whole number, halves up; when both sides of the ratio are positive, at least one
    block of each kind (so ``1:12`` of 6 blocks is 1). Gives the counts of the paper's Tables 9 and 10.

    Raises:
        ValueError: for a ratio that is not ``a:b`` or fewer blocks than kinds of blocks.
    """
    parts = ratio.split(":")
    if len(parts) != 2 or not all(p.strip().isascii() and p.strip().isdigit() for p in parts):
        raise ValueError(f"the block ratio is {ratio!r}; write two whole numbers such as 1:5")
    attention, other = int(parts[0]), int(parts[1])
    if attention == other == 0:
        raise ValueError("the block ratio 0:0 has no block; write 1:0 (all) or 0:1 (none)")
    kinds = (attention > 0) + (other > 0)
    if num_blocks < kinds:
        raise ValueError(
            f"{num_blocks} blocks cannot hold the {kinds} kind(s) of block of the ratio {ratio}; "
            f"use at least {kinds} blocks"
        )
    total = attention + other
    count = _divide(num_blocks * attention, total)
    return min(max(count, int(attention > 0)), num_blocks - int(other > 0))


def attention_blocks(num_blocks: int, ratio: str, placement: str) -> list[int]:
    """1-based indices of the attention-bearing blocks, ascending.

    ========  ===================================================================================
    scatter   k blocks cut the stack into k+1 runs, each position rounded on its own
    middle    k blocks with one equal gap, centred; where that would put attention first: scatter
    front     middle, with its first block moved to block 1; of as many blocks of each kind the odd ones
    end       middle, with its last block moved to the last block
    cluster   one run, with three quarters of the other blocks before it
    sandwich  a run at each end, about a third each, and the rest in the centre
    ========  ===================================================================================

    Source: the index sets of arXiv:2510.04800 (Tables 11, 17 and 21); sets that
    follow no rule are in :data:`PAPER_SETS`.

    Raises:
        ValueError: for an unknown placement or a ratio that does not fit.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"the block placement is {placement!r}; use one of {', '.join(PLACEMENTS)}")
    count = attention_count(num_blocks, ratio)
    if count in (0, num_blocks):
        return list(range(1, count + 1))
    return _place(num_blocks, count, placement)


def _place(blocks: int, count: int, placement: str) -> list[int]:
    """The rules in the table of :func:`attention_blocks`, for 0 < count < blocks."""
    if (blocks, count, placement) in PAPER_SETS:
        return list(PAPER_SETS[blocks, count, placement])
    if placement == "scatter":
        gaps = count + 1
        return [_divide(i * (blocks + 1), gaps) for i in range(1, gaps)]
    if placement == "cluster":
        start = 1 + round(3 * (blocks - count) / 4)
        return list(range(start, start + count))
    if placement == "sandwich":
        outer = (count + 1) // 3
        inner = count - 2 * outer
        start = (blocks - inner) // 2 + 1
        first, centre = range(1, outer + 1), range(start, start + inner)
        return [*first, *centre, *range(blocks - outer + 1, blocks + 1)]
    if placement == "front":
        if 2 * count == blocks:
            return list(range(1, blocks, 2))
        return [1, *_place(blocks, count, "middle")[1:]]
    if placement == "end":
        return [*_place(blocks, count, "middle")[:-1], blocks]
    gap = _divide(blocks + 1, count + 1)
    spare = blocks - (1 + (count - 1) * gap)
    if spare < 1:
        return _place(blocks, count, "scatter")
    start = 1 + (spare + 1) // 2
    return [start + i * gap for i in range(count)]


def _divide(a: int, b: int) -> int:
    """a / b to the nearest whole number, halves up."""
    return (2 * a + b) // (2 * b)


def from_blocks(
    num_blocks: int,
    ratio: str,
    placement: str = "scatter",
    mixers: str = "P:M",
    ffn: str = "dense",
) -> Pattern:
    """The pattern of ``num_blocks`` blocks, each a mixer and (unless ``ffn`` is none) an FFN.

    Args:
        ratio: attention-bearing blocks to other blocks, such as ``1:5``.
        mixers: their two mixer symbols in that order, such as ``P:M``, ``*:M`` or ``*:W``.
        ffn: dense (``-``), moe (``E``) or none.

    Raises:
        ValueError: for a value outside these.
    """
    endings = {"dense": "-", "moe": "E", "none": ""}
    if ffn not in endings:
        raise ValueError(f"the feed-forward layer is {ffn!r}; use one of {', '.join(endings)}")
    pair = mixers.split(":")
    if len(pair) != 2 or not all(s in LAYERS and LAYERS[s].kind == "mixer" for s in pair):
        raise ValueError(f"the block mixers are {mixers!r}; write two of {symbols_of('mixer')} such as P:M")
    chosen = set(attention_blocks(num_blocks, ratio, placement))
    blocks = (pair[0] if i in chosen else pair[1] for i in range(1, num_blocks + 1))
    return Pattern(("".join(mixer + endings[ffn] for mixer in blocks),))
