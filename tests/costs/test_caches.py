"""Caches of generation, and matched sizes, against counts written out by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.costs import model_parameters, training_flops_per_token
from megatron_hybrid.costs.caches import CONTEXT_LENGTHS, layer_cache, model_cache
from megatron_hybrid.costs.match import match_flops, match_parameters
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import parse
from megatron_hybrid.placement import from_blocks
from tests.costs.test_costs import SMALL

# SMALL has 2 key heads of 6, in P one of 4 with values of 6; an SSM of 24, in P of 16, with one group of state 5;
# q = k = 6, v = 20 and 4 states [3, 5] in G; a window of 2 and 1 sink.


def test_layers_keep_what_a_later_token_needs():
    state = Cache(0, 4 * (24 + 5 + 5), 24 * 5)
    assert {symbol: layer_cache(symbol, SMALL, 10) for symbol in LAYERS} == {
        "*": Cache(10 * 2 * (6 + 6)),
        "W": Cache(3 * 2 * (6 + 6)),
        "M": state,
        "P": Cache(10 * (4 + 6), 4 * (16 + 5 + 5), 16 * 5),
        "G": Cache(0, 4 * (6 + 6 + 20), 4 * 3 * 5),
        "-": Cache(),
        "E": Cache(),
    }
    grouped = dataclasses.replace(SMALL, mamba_groups=3)
    assert layer_cache("M", grouped, 10).conv == 4 * (24 + 3 * (5 + 5))


@given(st.integers(1, 50), st.integers(1, 30), st.integers(0, 30))
def test_a_window_keeps_itself_and_its_sinks(length, window, sinks):
    sizes = dataclasses.replace(SMALL, window=window, sinks=sinks)
    # what the last query sees
    seen = sum(length - 1 - j < window or j < sinks for j in range(length))
    assert layer_cache("W", sizes, length).key_value == seen * 24


def intra_sizes(**changes):
    return dataclasses.replace(SMALL, own=(("P", dataclasses.replace(SMALL.of("P"), **changes)),))


def test_shared_values_of_two_attentions_are_kept_once_and_of_a_mamba_branch_are_not_grouped():
    twice = ("attention", "attention")
    # one key head: K of 4 and V of 6 elements
    width = SMALL.of("P").qk_head_dim, SMALL.of("P").value_head_dim
    assert width == (4, 6)
    assert layer_cache("P", intra_sizes(branches=twice), 10) == Cache(10 * 2 * (4 + 6))
    assert layer_cache("P", intra_sizes(branches=twice, value="shared"), 10) == Cache(10 * (2 * 4 + 6))
    # x of 16 is V: 2 query heads with 8 of it each
    both = layer_cache("P", intra_sizes(value="shared", value_dim=16), 10)
    assert both == Cache(10 * (4 + 16), 4 * (16 + 5 + 5), 16 * 5)
    windowed = layer_cache("P", intra_sizes(window=3, sinks=2), 10)
    assert windowed.key_value == 5 * (4 + 6)


def test_two_mambas_have_two_states():
    found = layer_cache("P", intra_sizes(branches=("mamba", "mamba")), 10)
    assert found == Cache(0, 2 * 4 * (16 + 5 + 5), 2 * 16 * 5)


def test_a_model_keeps_the_sum_of_its_layers_and_nothing_of_its_prediction_heads():
    found = model_cache(parse("M*-W|M*P/W-"), SMALL, 100)
    layers = [layer_cache(symbol, SMALL, 100) for symbol in "M*-WM*P"]
    assert found == Cache(*(sum(part) for part in zip(*layers, strict=True)))
    assert found.size() == 2 * sum(found)
    assert found.size(1, 4) == found.key_value + found.conv + 4 * found.state


def test_only_full_attention_grows_from_4k_to_1m():
    assert (CONTEXT_LENGTHS[0], CONTEXT_LENGTHS[-1]) == (4096, 2**20)
    first, last = ({s: sum(layer_cache(s, SMALL, n)) for s in LAYERS} for n in (4096, 2**20))
    assert last["*"] == 256 * first["*"]
    assert {s for s in LAYERS if last[s] != first[s]} == {"*", "P"}


def test_a_rank_keeps_its_share():
    for symbol in LAYERS:
        whole, half = layer_cache(symbol, SMALL, 64), layer_cache(symbol, shardable().shard(2), 64)
        assert half.key_value * 2 == layer_cache(symbol, shardable(), 64).key_value, symbol
        assert half.state * 2 == layer_cache(symbol, shardable(), 64).state, symbol
        assert bool(whole.conv) == bool(half.conv)
    # fewer key heads than ranks: one each
    assert layer_cache("*", shardable().shard(4), 10).key_value == 10 * (6 + 6)


def shardable():
    """SMALL with heads that two ranks can share out."""
    changes = {"num_query_groups": 2, "norm_groups": None}
    return dataclasses.replace(intra_sizes(**changes), mamba_heads=4, mamba_groups=2)


def test_a_cache_that_is_refused():
    with pytest.raises(ValueError, match="is not a layer"):
        layer_cache("D", SMALL, 10)


# Matched sizes -------------------------------------------------------------------------------------


@given(st.integers(1, 30_000), st.sampled_from(["1:0", "1:1", "1:3", "1:12"]))
def test_no_number_of_blocks_is_nearer(reference, ratio):
    def pattern_of(blocks):
        return from_blocks(blocks, ratio, "scatter", "P:M")

    def distance(blocks):
        return abs(model_parameters(pattern_of(blocks), SMALL).active_non_embedding - reference)

    found = match_parameters(reference, pattern_of, SMALL)
    fewest = 1 if ratio == "1:0" else 2  # fewer blocks than kinds of block are refused, and skipped
    others = {fewest, fewest + 1, max(fewest, found - 1), found, found + 1, 2 * found}
    assert distance(found) == min(distance(blocks) for blocks in others)


def test_experts_match_by_what_a_token_meets():
    def pattern_of(blocks):
        return parse("*E" * blocks)

    few = model_parameters(parse("*E" * 5), SMALL)
    many = dataclasses.replace(SMALL, experts=SMALL.experts + 1)
    assert match_parameters(few.active_non_embedding, pattern_of, SMALL) == 5
    # One more idle expert adds its router row of 16 alone.
    assert match_parameters(few.active_non_embedding + 5 * 16, pattern_of, many) == 5


@pytest.mark.parametrize("convention", ["paper", "model"])
def test_equal_flops_are_equal(convention):
    tokens = match_flops(1e15, parse("M-P-"), SMALL, convention)
    # One multiplication and one division: two roundings.
    assert tokens * training_flops_per_token(parse("M-P-"), SMALL, convention) == pytest.approx(1e15, rel=1e-15)


def test_matches_that_are_refused():
    with pytest.raises(ValueError, match="it must have some"):
        match_parameters(0, lambda blocks: parse("M" * blocks), SMALL)
    with pytest.raises(ValueError, match="still have fewer"):
        match_parameters(10**9, lambda blocks: parse("M"), SMALL)
    with pytest.raises(ValueError, match="no number of blocks makes a pattern: the block ratio is 'one'"):
        match_parameters(10, lambda blocks: from_blocks(blocks, "one"), SMALL)
