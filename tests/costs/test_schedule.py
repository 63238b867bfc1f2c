"""The pipeline schedule against closed formulas, and properties that hold for any costs of stages."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.costs.schedule import (
    Pass,
    bubble_fraction,
    in_flight,
    passes,
    pipeline_bubble,
    pipeline_time,
    warm_up,
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Stages, micro-batches and segments that upstream runs."""
    pp, vpp = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    micro = draw(st.integers(1, 4)) * pp if vpp > 1 else draw(st.integers(1, 14))
    return pp, micro, vpp


@st.composite
def costs(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Forward and backward costs of segments, micro-batches, segments of a stage. Integers, so that sums are exact."""
    pp, micro, vpp = draw(shapes())
    cost = st.lists(st.integers(0, 20), min_size=pp * vpp, max_size=pp * vpp)
    return draw(cost), draw(cost), micro, vpp


@pytest.mark.parametrize("vpp", [1, 2, 3, 5])
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_equal_stages_give_the_closed_formula(pp, vpp, rounds):
    micro, forward, backward = pp * rounds, Fraction(3), Fraction(7)
    segments = pp * vpp
    time = pipeline_time([forward] * segments, [backward] * segments, micro, vpp)
    assert time == (vpp * micro + pp - 1) * (forward + backward)
    bubble = pipeline_bubble([forward] * segments, [backward] * segments, micro, vpp)
    assert bubble == Fraction(pp - 1, vpp * micro + pp - 1)
    assert float(bubble) == bubble_fraction(pp, micro, vpp)


def test_fewer_micro_batches_than_stages():
    assert pipeline_time([1] * 4, [2] * 4, micro_batches=1) == 12
    assert pipeline_time([1] * 4, [2] * 4, micro_batches=3) == 18
    assert bubble_fraction(4, 1) == 3 / 4


def test_one_slow_stage():
    """By hand: the slow stage's own 8 forward and backward passes, behind one forward and before one backward."""
    assert pipeline_time([1, 10, 1], [2, 20, 2], micro_batches=8) == 1 + 8 * (10 + 20) + 2


def test_interleaved_order():
    """The first of 4 stages with 2 segments each: 3 * 2 + 4 passes ahead, then one forward and one backward in turn."""
    row = passes(4, 0, 8, 2)
    assert [(p.micro_batch + 1, p.segment) for p in row[:11]] == [
        *((i, 0) for i in (1, 2, 3, 4)),
        *((i, 1) for i in (1, 2, 3, 4)),
        *((i, 0) for i in (5, 6, 7)),
    ]
    assert row[11:15] == [Pass(False, 0, 1), Pass(True, 7, 0), Pass(False, 1, 1), Pass(True, 4, 1)]


def test_upstreams_documented_table():
    """The example beside ``get_schedule_table`` has groups of 3; in groups of 2 the micro-batches go 0 1, 0 1, 2 3."""
    forward = [p for p in passes(2, 1, 4, 2) if p.forward]
    assert [p.micro_batch for p in forward] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [p.segment for p in forward] == [0, 0, 1, 1, 0, 0, 1, 1]


@given(shapes())
def test_every_micro_batch_passes_every_segment_both_ways_once(shape):
    pp, micro, vpp = shape
    for stage in range(pp):
        row = passes(pp, stage, micro, vpp)
        assert len(set(row)) == len(row) == 2 * micro * vpp
        ahead = warm_up(pp, stage, micro, vpp)
        assert all(p.forward for p in row[:ahead])
        assert sum(in_flight(pp, stage, micro, vpp)) == min(ahead + 1, micro * vpp)


def test_micro_batches_in_flight():
    assert [in_flight(4, stage, 8) for stage in range(4)] == [(4,), (3,), (2,), (1,)]
    assert [in_flight(4, stage, 2) for stage in range(4)] == [(2,), (2,), (2,), (1,)]
    assert sum(in_flight(4, 0, 8, 2)) == 3 * 2 + 4 + 1


def test_the_moment_with_most_activations_depends_on_the_segments():
    """By hand (micro-batch, segment): ahead 00 10 01, back 01, ahead 11, back 11, ahead 20: three of segment 0."""
    assert in_flight(2, 1, 8, 2) == (2, 1)
    assert in_flight(2, 1, 8, 2, weights=[100, 1]) == (3, 0)


@settings(deadline=None)
@given(costs())
def test_never_shorter_than_the_slowest_stage_or_the_way_of_one_micro_batch(case):
    forward, backward, micro, vpp = case
    pp = len(forward) // vpp
    time = pipeline_time(forward, backward, micro, vpp)
    work = [micro * sum(forward[stage::pp] + backward[stage::pp]) for stage in range(pp)]
    assert max(work) <= time <= sum(work)
    assert time >= sum(forward) + sum(backward)
    assert 0 <= pipeline_bubble(forward, backward, micro, vpp) <= 1


@settings(deadline=None)
@given(costs(), st.data())
def test_a_slower_segment_never_makes_the_step_shorter(case, data):
    forward, backward, micro, vpp = case
    before = pipeline_time(forward, backward, micro, vpp)
    which = data.draw(st.integers(0, len(forward) - 1))
    (data.draw(st.sampled_from([forward, backward])))[which] += data.draw(st.integers(1, 20))
    assert pipeline_time(forward, backward, micro, vpp) >= before


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="6 micro-batches over 4 stages of 2 segments.*a multiple of 4"):
        bubble_fraction(4, 6, 2)
    with pytest.raises(ValueError, match="5 forward and 5 backward times for 2 segments"):
        pipeline_time([1] * 5, [1] * 5, 8, 2)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_many_micro_batches_hold_what_the_whole_schedule_holds(pp, vpp, data):
    """in_flight looks at the first rounds alone."""
    micro = pp * data.draw(st.integers(4, 8))
    stage = data.draw(st.integers(0, pp - 1))
    weights = data.draw(st.lists(st.integers(1, 100), min_size=vpp, max_size=vpp))
    held, most = [0] * vpp, 0
    for one in passes(pp, stage, micro, vpp):
        held[one.segment] += 1 if one.forward else -1
        most = max(most, sum(n * w for n, w in zip(held, weights, strict=True)))
    found = in_flight(pp, stage, micro, vpp, weights)
    assert sum(n * w for n, w in zip(found, weights, strict=True)) == most
