"""Pipeline stages of equal work: where to put ``|``."""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.costs.flops import head_flops_per_token, layer_flops_per_token, mtp_flops_per_token
from megatron_hybrid.pattern import Pattern


class Work(NamedTuple):
    """Forward FLOPs per token of what a segment holds; backward is twice that of each."""

    layers: list[float]
    """One for each layer."""
    head: float
    """Output head and MTP heads: the last segment only."""

    @property
    def total(self) -> float:
        return sum(self.layers) + self.head


def segment_work(pattern: Pattern, sizes: Sizes) -> list[Work]:
    """The work of each segment of a pattern.

    The embedding is a lookup without products, and counts as nothing; the output head is the work of several layers
    and belongs to the last segment, as the MTP heads do.
    """
    parts = pattern.segments
    cost = {symbol: layer_flops_per_token(symbol, sizes) for symbol in set(pattern.layers)}
    head = head_flops_per_token(sizes) + mtp_flops_per_token(pattern, sizes)
    return [
        Work([cost[symbol] for symbol in part], head if i == len(parts) - 1 else 0.0) for i, part in enumerate(parts)
    ]


def stage_work(pattern: Pattern, sizes: Sizes, pp: int) -> list[float]:
    """Forward FLOPs per token of each of ``pp`` stages; segment i belongs to stage i % pp."""
    totals = [work.total for work in segment_work(pattern, sizes)]
    return [sum(totals[i::pp]) for i in range(pp)]


def imbalance(work: list[float]) -> float:
    """The slowest stage's work over the mean: the step takes this times longer than with equal stages."""
    return max(work) * len(work) / sum(work)


def equal_count(pattern: Pattern, segments: int) -> Pattern:
    """The same layers in segments of equal numbers of layers; the first ones are longer where they do not divide."""
    layers = pattern.layers
    each, longer = divmod(len(layers), segments)
    ends = [i * each + min(i, longer) for i in range(segments + 1)]
    return Pattern(tuple(layers[a:b] for a, b in pairwise(ends)), pattern.mtp, pattern.mtp_depths)


@lru_cache(maxsize=256)
def balance_pipeline(pattern: Pattern, sizes: Sizes, segments: int, pp: int | None = None) -> Pattern:
    """The pattern with ``|`` where its segments cost the same; boundaries that it has are dropped.

    Of all ways to cut the layers into segments of at least one layer, one whose largest segment is smallest, and among
    these the one whose segments are the most alike (least sum of squares). With several segments for each stage the
    equal-count cut is taken where its largest stage is smaller.

    Args:
        segments: Number of segments; a multiple of ``pp``.
        pp: Pipeline stages; default one for each segment.

    Raises:
        ValueError: More segments than layers, or segments that do not divide over the stages.
    """
    pp = segments if pp is None else pp
    layers = pattern.layers
    if segments < 1 or segments > len(layers):
        raise ValueError(
            f"{segments} pipeline segments of {len(layers)} layers: give a number from 1 to {len(layers)}, so that "
            "each segment has a layer."
        )
    if segments % pp:
        raise ValueError(
            f"{segments} pipeline segments do not divide over {pp} stages: give a multiple of {pp} (each stage takes "
            "as many segments), or change --pipeline-model-parallel-size."
        )
    whole = segment_work(pattern.without_boundaries(), sizes)[0]
    ends = _cut(whole.layers, whole.head, segments)
    cut = Pattern(tuple(layers[a:b] for a, b in pairwise(ends)), pattern.mtp, pattern.mtp_depths)
    plain = equal_count(pattern, segments)
    return min(cut, plain, key=lambda p: max(stage_work(p, sizes, pp)))


def _cut(costs: list[float], last: float, segments: int) -> list[int]:
    """Ends of the segments, 0 first; ``last`` belongs to the last segment.

    Two passes over the same table, since a cut whose beginning is the most alike need not have the least largest
    segment: first the least largest segment, then the least sum of squares among the cuts that stay within it.
    """
    largest, _ = _best(costs, last, segments, max, math.inf)
    return _best(costs, last, segments, lambda total, cost: total + cost * cost, largest * (1 + 1e-12))[1]


def _best(
    costs: list[float], last: float, segments: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, list[int]]:
    """The cut that makes the joined costs of its segments least, none above ``limit``: that value, and the ends."""
    sums, n = list(accumulate(costs, initial=0.0)), len(costs)
    # row[i]: the best cut of the first i layers, None where there is none
    row: list[tuple[float, list[int]] | None] = [(0.0, [0]), *[None] * n]
    for k in range(1, segments + 1):
        extra = last if k == segments else 0.0
        following: list[tuple[float, list[int]] | None] = [None] * (n + 1)
        for end in range(k, n - (segments - k) + 1):
            found = [
                (join(before[0], cost), [*before[1], end])
                for start in range(k - 1, end)
                if (before := row[start]) and (cost := sums[end] - sums[start] + extra) <= limit
            ]
            following[end] = min(found, default=None)
        row = following
    result = row[n]
    assert result is not None  # the caller gives no more segments than layers, and a limit that a cut reaches
    return result
