"""Pipeline stages of equal work, by the model's own count of FLOPs."""

import dataclasses
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid import costs
from megatron_hybrid.costs import balance_pipeline, equal_count, imbalance, segment_work, stage_work
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import Pattern, parse
from tests.costs.test_costs import SMALL, model_of

LAYER_STRINGS = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=14).map("".join)


def largest(pattern):
    return max(work.total for work in segment_work(pattern, SMALL))


def all_cuts(layers, segments):
    for inner in combinations(range(1, len(layers)), segments - 1):
        yield Pattern(tuple(layers[a:b] for a, b in pairwise([0, *inner, len(layers)])))


@given(LAYER_STRINGS, st.data())
def test_no_cut_has_a_smaller_largest_segment_nor_is_any_as_good_and_more_alike(layers, data):
    segments = data.draw(st.integers(1, min(5, len(layers))))
    found = balance_pipeline(parse(layers), SMALL, segments)
    assert found.layers == layers
    assert len(found.segments) == segments
    assert all(found.segments)

    def order(pattern):
        totals = [work.total for work in segment_work(pattern, SMALL)]
        return max(totals), sum(total**2 for total in totals)

    best = min(order(cut) for cut in all_cuts(layers, segments))
    # sums in another order: rounding of doubles alone
    assert order(found) == pytest.approx(best, rel=1e-9)


@given(LAYER_STRINGS, st.integers(1, 3), st.integers(1, 3))
def test_stages_are_never_worse_than_those_of_equal_counts(layers, pp, vpp):
    if pp * vpp > len(layers):
        return
    found = balance_pipeline(parse(layers), SMALL, pp * vpp, pp)
    plain = equal_count(parse(layers), pp * vpp)
    assert max(stage_work(found, SMALL, pp)) <= max(stage_work(plain, SMALL, pp))


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("PPPP--------M-M-", {"seq_length": 200}),  # clustered attention
        ("M-M-M-M-MEMEMEME", {"expert_ffn": 200}),  # experts at the end
        ("*-*-*-*-*-*-*-*-", {"padded_vocab": 2000}),  # a large output head
    ],
)
def test_stages_of_lopsided_patterns_are_better_than_those_of_equal_counts(pattern, change):
    sizes = dataclasses.replace(SMALL, **change)
    found = stage_work(balance_pipeline(parse(pattern), sizes, 2), sizes, 2)
    plain = stage_work(equal_count(parse(pattern), 2), sizes, 2)
    assert max(found) < 0.95 * max(plain)


@given(st.sampled_from("*PE"), st.integers(4, 12), st.data())
def test_clustered_expensive_layers_always_gain(symbol, count, data):
    """A run of one expensive layer type in front of as many cheap ones: equal counts put all of it on one stage."""
    sizes = dataclasses.replace(SMALL, seq_length=400, expert_ffn=300, padded_vocab=8)
    layers = symbol * count + data.draw(st.sampled_from("M-")) * count
    found = max(stage_work(balance_pipeline(parse(layers), sizes, 2), sizes, 2))
    plain = max(stage_work(equal_count(parse(layers), 2), sizes, 2))
    dear, cheap = (costs.layer_flops_per_token(c, sizes) for c in (symbol, layers[-1]))
    assert dear > 1.5 * cheap
    # n dear layers on one stage against half of all work, rounded up by at most one layer
    assert found <= (count * (dear + cheap) + costs.head_flops_per_token(sizes)) / 2 + dear
    assert found < plain


def test_the_work_of_all_segments_is_the_models_training_flops():
    pattern = parse("M*-|E/W-/W-")
    total = sum(work.total for work in segment_work(pattern, SMALL))
    assert 3 * total == pytest.approx(costs.training_flops_per_token(pattern, SMALL), rel=1e-12)
    assert [work.head > 0 for work in segment_work(pattern, SMALL)] == [False, True]


def test_the_head_takes_layers_from_the_last_stage():
    pattern, sizes = model_of("paper-1b-intra")
    balanced = balance_pipeline(pattern, sizes, 4)
    assert str(balanced) == "M-M-M-M-|P-M-M-M-|P-M-M-M-|M-"
    # 128,256 x 2,048 weights of the head beside about 74 million in a block of mixer and FFN
    assert imbalance(stage_work(balanced, sizes, 4)) < 1.06
    assert imbalance(stage_work(equal_count(pattern, 4), sizes, 4)) > 1.5


def test_boundaries_that_the_pattern_has_are_dropped_and_heads_stay():
    found = balance_pipeline(parse("M|*-E|-/W-/W-"), SMALL, 2)
    assert len(found.segments) == 2
    assert (found.layers, found.mtp, found.mtp_depths) == ("M*-E-", "W-", 2)


@pytest.mark.parametrize(
    ("segments", "pp", "words"), [(0, None, "0 pipeline"), (5, None, "5 pipeline"), (3, 2, "over 2")]
)
def test_cuts_that_are_refused(segments, pp, words):
    with pytest.raises(ValueError, match=words):
        balance_pipeline(parse("M-*-"), SMALL, segments, pp)
