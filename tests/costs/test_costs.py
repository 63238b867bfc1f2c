"""Parameters and FLOPs of layers that are written out by hand; what the paper prints is in test_published_costs.py."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.accounting.scan import pairs_in_chunks
from megatron_hybrid.cli.recipes import recipe, recipes
from megatron_hybrid.costs import (
    Sizes,
    attention_core_flops,
    layer_flops_per_token,
    layer_parameters,
    model_parameters,
    sizes_of,
    training_flops,
    training_flops_per_token,
)
from megatron_hybrid.layers.intra.design import design
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import parse
from megatron_hybrid.placement import from_blocks


def namespace(**settings):
    return SimpleNamespace(**{"add_bias_linear": False, "normalization": "RMSNorm", **settings})


def model_of(name):
    """Pattern and sizes of a recipe, read from its flags alone."""
    flags = {k[2:].replace("-", "_"): v for k, v in recipe(name).flags.items()}
    pattern = from_blocks(
        flags["num_blocks"],
        flags["block_ratio"],
        flags["block_placement"],
        flags["block_mixers"],
        flags["ffn"],
    )
    return pattern, sizes_of(namespace(**flags))


def distinct_models():
    """Names of the paper's recipes, one for each model: placements, lengths of samples and training make no other."""
    found = {}
    for name in (r.name for r in recipes() if r.name.startswith("paper-") and "-scaling-" not in r.name):
        pattern, sizes = model_of(name)
        found.setdefault((tuple(pattern.counts().values()), dataclasses.replace(sizes, seq_length=1)), name)
    return list(found.values())


# Layers written out ------------------------------------------------------------------------------

SMALL = Sizes(
    hidden=16,
    padded_vocab=32,
    seq_length=10,
    heads=4,
    query_groups=2,
    head_dim=6,
    mamba_heads=3,
    mamba_head_dim=8,
    mamba_groups=1,
    state_dim=5,
    own=(
        (
            "P",
            design(
                SimpleNamespace(
                    hidden_size=16,
                    num_attention_heads=4,
                    intra_num_query_groups=1,
                    intra_value_dim=12,
                    mamba_head_dim=8,
                    mamba_num_groups=1,
                    mamba_state_dim=5,
                )
            ),
        ),
    ),
    ffn=20,
    experts=4,
    topk=1,
    expert_ffn=10,
    shared_ffn=7,
    delta_key_heads=2,
    delta_value_heads=4,
    delta_key_dim=3,
    delta_value_dim=5,
    window=2,
    sinks=1,
)

# Shapes as in the modules' constructors, the input norm first. q = 24, k = v = 12 for attention;
# z = x = 24, B = C = 5, dt = 3 for M; q = 8, k = 4, v = 6, z = x = 16, dt = 2 for P; q = k = 6,
# v = z = 20, alpha = beta = 4 for G.
SHAPES = {
    "*": [[16], [16, 24 + 12 + 12], [24, 16]],
    "M": [[16], [16, 24 + 24 + 5 + 5 + 3], [34, 4], [34], [3], [3], [3], [24], [24, 16]],
    "P": [
        *([16], [16, 8 + 4 + 6 + 16 + 16 + 5 + 5 + 2], [26, 4], [26], [2], [2], [2]),
        *([16], [12], [12 + 16, 16]),
    ],
    "G": [[16], [16, 6 + 6 + 20 + 20 + 4 + 4], [32, 4], [4], [4], [5], [20, 16]],
    "-": [[16], [16, 40], [20, 16]],
    "E": [[16], [16, 4], *([16, 20], [10, 16]) * 4, [16, 14], [7, 16]],
}
SHAPES["W"] = SHAPES["*"]


def numel(shapes):
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("symbol", LAYERS)
def test_layer_parameters_are_the_sum_of_the_shapes(symbol):
    found = layer_parameters(symbol, SMALL)
    assert found.total == numel(SHAPES[symbol])
    idle = numel([[16, 20], [10, 16]]) * 3 if symbol == "E" else 0
    assert found.active == found.total - idle


def test_biases_layer_norms_and_qk_norms_are_counted():
    odd = dataclasses.replace(SMALL, bias=True, layer_norm=True, qk_norm=True, shared_ffn=0)
    qk_norms = [[6], [6], [6], [6]]  # weight and bias over one head, for q and for k
    attention = [*SHAPES["*"], [16], [48], [16], *qk_norms]
    assert layer_parameters("*", odd).total == numel(attention)
    assert layer_parameters("-", odd).total == numel([*SHAPES["-"], [16], [40], [16]])
    experts = [[16, 4], [4], *([16, 20], [20], [10, 16], [16]) * 4]
    assert layer_parameters("E", odd).total == numel([[16], [16], *experts])
    assert layer_parameters("M", odd).total == numel([*SHAPES["M"], [16]])
    gate = dataclasses.replace(SMALL, shared_gate=True)
    assert layer_parameters("E", gate).total == layer_parameters("E", SMALL).total + 16


@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=12).map("".join),
    st.integers(0, 2),
    st.booleans(),
)
def test_a_model_is_the_sum_of_its_parts(layers, depths, tied):
    sizes = dataclasses.replace(SMALL, tied=tied)
    pattern = parse(layers + "/M-" * depths)
    found = model_parameters(pattern, sizes)
    embedding = 32 * 16 * (1 if tied else 2)
    head = numel([*SHAPES["M"], *SHAPES["-"], [16], [16], [16], [32, 16]])
    assert found.embedding == embedding
    assert found.non_embedding == sum(numel(SHAPES[c]) for c in layers) + 16 + depths * head
    assert found.active <= found.total
    assert found.active_non_embedding == found.active - embedding
    shared = dataclasses.replace(sizes, mtp_repeated=True)
    assert model_parameters(pattern, shared).total == found.total - max(0, depths - 1) * head


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 20))
def test_attention_flops_count_the_pairs_that_the_mask_leaves(length, window, sinks):
    pairs = sum(i - j < window or j < sinks for i in range(length) for j in range(i + 1))
    found = attention_core_flops(8, 12, length, window + sinks)
    # One product with a key of width 8 and one with a value of width 12 per pair; exact in
    # rational numbers, so only float rounding remains.
    assert found * length == pytest.approx(pairs * 2 * (8 + 12), rel=1e-12)
    if window >= length:
        assert attention_core_flops(8, 12, length) == found


@given(st.integers(1, 400), st.integers(1, 130))
def test_pairs_in_chunks_are_those_of_a_token_and_one_before_it(length, chunk):
    chunks = [min(chunk, length - start) for start in range(0, length, chunk)]
    assert pairs_in_chunks(length, chunk) == sum(i + 1 for q in chunks for i in range(q))
    assert pairs_in_chunks(length, chunk, masked=False) == sum(q * q for q in chunks)


def test_the_paper_counts_cores_by_its_own_formulas():
    cores = {
        "*": 2 * 48 * 5.5,
        "M": 9 * 24 * 5 + 2 * 24,
        "P": 2 * (8 + 12) * 5.5 + 9 * 16 * 5 + 2 * 16,
        "G": 8 * 4 * 3 * 5,
        "E": 0,
    }
    for symbol, core in cores.items():
        weights = layer_parameters(symbol, SMALL).active + 16  # and the final norm
        assert training_flops_per_token(parse(symbol), SMALL, "paper") == pytest.approx(6 * weights + 3 * core)


def test_model_flops_are_the_matrix_products_that_run():
    pairs = 10 * 11 / 2 / 10
    forward = {
        "*": 2 * (16 * 48 + 24 * 16) + 2 * 48 * pairs,
        "W": 2 * (16 * 48 + 24 * 16) + 2 * 48 * (1 + 2 + 3 * 8) / 10,
        # C B^T and its product with x for each pair of the one, short chunk; into the state and out of it
        "M": 2 * (16 * 61 + 34 * 4 + 24 * 16) + 2 * (5 + 24) * pairs + 2 * 2 * 24 * 5,
        "P": 2 * (16 * 62 + 26 * 4 + 28 * 16) + 2 * (8 + 12) * pairs + 2 * (5 + 16) * pairs + 2 * 2 * 16 * 5,
        # three products with keys and two with values for each pair, three with the state for each token; 4 heads
        "G": 2 * (16 * 60 + 32 * 4 + 20 * 16) + 4 * (2 * (3 * 3 + 2 * 5) * pairs + 3 * 2 * 3 * 5),
        "-": 2 * (16 * 40 + 20 * 16),
        "E": 2 * (16 * 4 + 16 * 20 + 10 * 16 + 16 * 14 + 7 * 16),
    }
    for symbol, expected in forward.items():
        assert layer_flops_per_token(symbol, SMALL) == pytest.approx(expected, rel=1e-12), symbol
    pattern = parse("M*-|E/W-/W-")
    head = 2 * 16 * 32
    heads = 3 * head + 2 * (2 * 32 * 16 + forward["W"] + forward["-"])
    once = sum(forward[c] for c in "M*-E") + heads
    assert training_flops_per_token(pattern, SMALL) == pytest.approx(3 * once, rel=1e-12)
    assert training_flops(pattern, SMALL, 7) == pytest.approx(3 * once * 70, rel=1e-12)


def test_defaults_are_megatrons_and_ours():
    sizes = sizes_of(namespace(hidden_size=96, num_attention_heads=4, seq_length=8, vocab_size=1000))
    assert (sizes.head_dim, sizes.query_groups, sizes.ffn) == (24, 4, 384)
    assert (sizes.padded_vocab, sizes.gated, sizes.tied) == (1024, False, True)
    assert (sizes.mamba_heads, sizes.mamba_groups) == (3, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": None}, "--hidden-size is not set"),
        ({"vocab_size": None}, "--vocab-size is not set"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"mamba_head_dim": 50}, "does not divide"),
        ({"moe_latent_size": 8}, "not counted"),
    ],
)
def test_sizes_that_are_refused(settings, words):
    given_sizes = {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 8, "vocab_size": 99}
    with pytest.raises(ValueError, match=words):
        sizes_of(namespace(**{**given_sizes, **settings}))


def test_costs_that_are_refused():
    with pytest.raises(ValueError, match="use model or paper"):
        training_flops_per_token(parse("M"), SMALL, "upstream")
    with pytest.raises(ValueError, match="is not a layer"):
        layer_parameters("D", SMALL)
    with pytest.raises(ValueError, match="--num-experts"):
        layer_parameters("E", dataclasses.replace(SMALL, experts=0))
    with pytest.raises(ValueError, match="have none of the layer P"):
        layer_parameters("P", dataclasses.replace(SMALL, own=()))
