"""The pipeline schedule: who computes what and when, micro-batches in flight, the bubble, and a step's time.

1F1B, or interleaved where stages have several segments, in the order of upstream's
``core/pipeline_parallel/schedules.py`` (``get_pp_rank_microbatches``, ``get_schedule_table``).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one segment of a stage."""

    forward: bool
    """Or backward."""
    micro_batch: int
    segment: int
    """Of the stage: 0 is its first in the model."""


def warm_up(pp: int, stage: int, micro_batches: int, vpp: int = 1) -> int:
    """Forward passes of a stage, each through one segment, before its first backward pass follows one more.

    Source: ``get_pp_rank_microbatches``. Without interleaving, one for each later stage; with it, a group of pp
    micro-batches through all segments but the last, and two for each later stage.
    """
    later = pp - stage - 1
    return min(later if vpp == 1 else 2 * later + (vpp - 1) * pp, micro_batches * vpp)


def passes(pp: int, stage: int, micro_batches: int, vpp: int = 1) -> list[Pass]:
    """All passes of a stage in a step, in order.

    Interleaved, groups of pp micro-batches go through one segment after another (``get_schedule_table`` with its
    default group); backward passes take the same order with the segments reversed.

    Raises:
        ValueError: Interleaving needs a multiple of pp micro-batches.
    """
    _check(pp, micro_batches, vpp)
    group = pp if vpp > 1 else micro_batches
    table = [
        (micro_batch, segment)
        for start in range(0, micro_batches, group)
        for segment in range(vpp)
        for micro_batch in range(start, start + group)
    ]
    forward = [Pass(True, micro_batch, segment) for micro_batch, segment in table]
    backward = [Pass(False, micro_batch, vpp - 1 - segment) for micro_batch, segment in table]
    ahead = warm_up(pp, stage, micro_batches, vpp)
    steady = [one for pair in zip(forward[ahead:], backward, strict=False) for one in pair]
    return forward[:ahead] + steady + backward[len(table) - ahead :]


def in_flight(
    pp: int, stage: int, micro_batches: int, vpp: int = 1, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Micro-batches whose activations each segment of a stage holds, when the stage holds most.

    Args:
        weights: Of one micro-batch in each segment, such as bytes; "most" is by their sum. Default: all equal.

    Returns:
        One number for each of the vpp segments; one segment holds min(pp - stage, micro_batches).
    """
    if vpp == 1:
        return (min(pp - stage, micro_batches),)
    weights = weights or [1] * vpp
    held, most = [0] * vpp, (0,) * vpp
    # After fewer than 2 pp micro-batches of warm-up, what is held repeats with every pp of them.
    for one in passes(pp, stage, min(micro_batches, 3 * pp), vpp):
        held[one.segment] += 1 if one.forward else -1
        if one.forward and _weigh(held, weights) > _weigh(most, weights):
            most = tuple(held)
    return most


def bubble_fraction(pp: int, micro_batches: int, vpp: int = 1) -> float:
    """Share of a step in which a stage waits, for stages of equal cost: (p - 1) / (v m + p - 1).

    Source: Narayanan et al., arXiv:2104.04473, section 2.2, whose fractions (p - 1) / m and (p - 1) / (v m) are of the
    ideal time v m in which no stage waits; the step takes v m + p - 1.

    Raises:
        ValueError: Interleaving needs a multiple of pp micro-batches.
    """
    _check(pp, micro_batches, vpp)
    return (pp - 1) / (vpp * micro_batches + pp - 1)


def pipeline_time(forward: Sequence[float], backward: Sequence[float], micro_batches: int, vpp: int = 1) -> float:
    """Time of all passes of a step, from the first to the last, with any costs of segments.

    A pass begins when its stage has finished the one before (:func:`passes`) and its input is there: the forward pass
    of the segment before, or the backward pass of the segment after. Messages take no time and wait for nobody.

    Args:
        forward, backward: Of one micro-batch in each segment, in the order of the model: pp * vpp of each.

    Returns:
        In the unit of the arguments, and exact where they are integers or fractions.

    Raises:
        ValueError: The segments are no multiple of vpp, or the micro-batches no multiple of pp where vpp > 1.
    """
    segments = len(forward)
    if not segments or segments % vpp or len(backward) != segments:
        raise ValueError(
            f"{segments} forward and {len(backward)} backward times for {vpp} segments of each stage: give one of both "
            f"for each segment, and a multiple of {vpp} of them."
        )
    pp = segments // vpp
    plans = [passes(pp, stage, micro_batches, vpp) for stage in range(pp)]
    clocks: list[float] = [0] * pp
    done = [0] * pp
    ended: dict[tuple[bool, int, int], float] = {}  # (forward, micro-batch, segment of the model) to its end
    while any(done[stage] < len(plans[stage]) for stage in range(pp)):
        for stage, plan in enumerate(plans):
            while done[stage] < len(plan):
                one = plan[done[stage]]
                place = one.segment * pp + stage
                ready = _ready(one, place, segments, ended)
                if ready is None:
                    break
                cost = forward[place] if one.forward else backward[place]
                clocks[stage] = max(clocks[stage], ready) + cost
                ended[one.forward, one.micro_batch, place] = clocks[stage]
                done[stage] += 1
    return max(clocks)


def pipeline_bubble(forward: Sequence[float], backward: Sequence[float], micro_batches: int, vpp: int = 1) -> float:
    """Share of :func:`pipeline_time` in which a stage waits, mean of the stages; of equal ones ``bubble_fraction``."""
    time = pipeline_time(forward, backward, micro_batches, vpp)
    work = micro_batches * (sum(forward) + sum(backward))
    return 1 - work / (time * (len(forward) // vpp)) if time else 0.0


def _ready(one: Pass, place: int, segments: int, ended: dict[tuple[bool, int, int], float]) -> float | None:
    """When the input of a pass is there; None: its end is not known yet."""
    if one.forward:
        return ended.get((True, one.micro_batch, place - 1)) if place else 0
    if place == segments - 1:
        return ended.get((True, one.micro_batch, place))
    return ended.get((False, one.micro_batch, place + 1))


def _weigh(held: Sequence[int], weights: Sequence[float]) -> float:
    return sum(number * weight for number, weight in zip(held, weights, strict=True))


def _check(pp: int, micro_batches: int, vpp: int) -> None:
    if vpp > 1 and micro_batches % pp:
        raise ValueError(
            f"{micro_batches} micro-batches over {pp} stages of {vpp} segments: interleaving takes groups of {pp} "
            f"micro-batches. Make the micro-batches of a step a multiple of {pp}, or give each stage one segment."
        )
