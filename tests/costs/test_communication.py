"""What the formulas of communication say without ranks; tests/costs/test_communication_measured.py measures them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_hybrid.accounting.traffic import NOTHING, CommunicationSettings, Traffic, all_reduce, scatter
from megatron_hybrid.costs import Layout, Sizes
from megatron_hybrid.costs.communication import layer_communication, step_communication
from megatron_hybrid.pattern import parse

SIZES = Sizes(
    hidden=64,
    padded_vocab=128,
    seq_length=64,
    heads=8,
    query_groups=4,
    head_dim=8,
    mamba_heads=16,
    mamba_head_dim=8,
    ffn=128,
    experts=8,
    expert_ffn=64,
    shared_ffn=64,
)
SETTINGS = CommunicationSettings()


def test_ring_algorithms():
    assert scatter(4, 100) == Traffic(1, 75)
    assert all_reduce(4, 100) == Traffic(1, 150)
    assert scatter(1, 100) == all_reduce(1, 100) == NOTHING


def test_one_rank_sends_nothing():
    sent = step_communication(parse("*-MEWG/*-"), SIZES, Layout(global_batch=4), SETTINGS)
    assert all(traffic == NOTHING for traffic in sent.values())


@pytest.mark.parametrize("symbol", "*WMG-")
def test_sequence_parallelism_sends_a_quarter_more(symbol):
    """An all-reduce each way becomes a gather and a scatter each way, and the input is gathered a second time."""
    plain = layer_communication(symbol, SIZES, Layout(tp=4), SETTINGS)["tensor"]
    sequence = layer_communication(symbol, SIZES, Layout(tp=4, sequence_parallel=True), SETTINGS)["tensor"]
    assert sequence.bytes == 1.25 * plain.bytes
    assert (plain.calls, sequence.calls) == (2, 5)


def test_keys_and_values_of_a_long_sequence():
    """By hand: 2 (K, V) x 2 (forward, backward) x 3/4 of 64 tokens x 4 heads of 8 channels in 16 bits."""
    sent = layer_communication("*", SIZES, Layout(cp=4), SETTINGS)["context"]
    assert sent == Traffic(4, 2 * 2 * 0.75 * 64 * 4 * 8 * 2)


def test_the_steps_traffic_grows_with_the_micro_batches_but_not_that_of_the_gradients():
    layout = Layout(tp=2, dp=2, global_batch=2)
    one, eight = (
        step_communication(parse("*-"), SIZES, replace(layout, global_batch=size), SETTINGS) for size in (2, 16)
    )
    assert eight["tensor"] == one["tensor"] * 8
    assert eight["data"] == one["data"] != NOTHING


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_distributed_optimizer_instances": 2}, "instances 2: .* not counted"),
        ({"moe_shared_expert_overlap": True}, "shared experts in between"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, "--fp8-recipe mxfp8 is not counted"),
        ({"fp4": "e2m1"}, "--fp4"),
    ],
)
def test_what_is_not_counted_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        CommunicationSettings.from_args(SimpleNamespace(**flags))


def test_settings_of_arguments():
    found = CommunicationSettings.from_args(
        SimpleNamespace(bf16=True, moe_router_dtype="fp32", overlap_param_gather=True, cross_entropy_loss_fusion=True)
    )
    assert (found.activation, found.probability, found.overlaps_gather, found.fused_cross_entropy) == (2, 4, True, True)
    plain = CommunicationSettings.from_args(SimpleNamespace())
    assert (plain.activation, plain.probability, plain.overlaps_gather, plain.fused_cross_entropy) == (
        4,
        4,
        False,
        False,
    )


def test_unknown_layer():
    with pytest.raises(ValueError, match="'X' is not a layer"):
        layer_communication("X", SIZES, Layout(), SETTINGS)
