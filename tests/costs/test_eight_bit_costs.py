"""Costs of --fp8-format, derived from Transformer Engine's code: written out for small layers, and against bf16."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.eight_bit import NOT_COUNTED, SCALES, eight_bit_recipe
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.accounting.tensors import weights
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.costs.activations import layer_saved, mtp_inner_saved
from megatron_hybrid.costs.communication import layer_communication
from megatron_hybrid.costs.memory import eight_bit_weights, rank_memory
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import parse
from tests.costs.test_costs import SMALL

BF16 = ActivationSettings()
TENSORWISE, DELAYED, BLOCKWISE = (replace(BF16, eight_bit=recipe) for recipe in ("tensorwise", "delayed", "blockwise"))


def bytes_of(symbol, settings, text, layout=None):
    """Of the lines of a layer's table that have the text in their names."""
    return sum(line.bytes for line in layer_saved(symbol, SMALL, layout or Layout(), settings) if text in line.name)


@pytest.mark.parametrize("symbol", "M*WPG-")
def test_the_input_of_a_linear_is_kept_in_one_byte(symbol):
    plain, less = (bytes_of(symbol, settings, "norm: output") for settings in (BF16, TENSORWISE))
    assert (plain, less) == (10 * 16 * 2, 10 * 16)
    blocks = bytes_of(symbol, BLOCKWISE, "norm: output")
    assert blocks == less * (1 + 4 / 128)


@pytest.mark.parametrize("symbol", "MPG-")
def test_so_is_that_of_the_second_one(symbol):
    text = "input of the second projection" if symbol == "-" else "input of the output projection"
    assert bytes_of(symbol, BF16, text) == 2 * bytes_of(symbol, DELAYED, text) > 0


@pytest.mark.parametrize("symbol", "*W")
def test_an_attention_core_keeps_its_output_in_16_bits(symbol):
    """Its linear takes that again, but with delayed scaling, which cannot quantise it twice alike."""
    text = "output, input of the output projection"
    assert bytes_of(symbol, BF16, text) == bytes_of(symbol, TENSORWISE, text) == bytes_of(symbol, DELAYED, text)
    copies = [bytes_of(symbol, settings, "output in 8 bits") for settings in (BF16, TENSORWISE, BLOCKWISE, DELAYED)]
    assert copies == [0, 0, 0, 10 * 24]


def test_a_router_reads_16_bits():
    assert bytes_of("E", BF16, "norm: output") == bytes_of("E", TENSORWISE, "norm: output")
    assert bytes_of("E", BF16, "tokens by expert") == 2 * bytes_of("E", TENSORWISE, "tokens by expert")


def test_rows_that_ranks_share_are_torchs():
    """One group of B and C on two ranks: the input projection stays in bf16, the output projection does not."""
    shared, layout = replace(SMALL, mamba_groups=1), Layout(tp=2)
    find = lambda name: next(  # noqa: E731
        line for line in layer_saved("M", shared, layout, TENSORWISE) if line.name.endswith(name)
    )
    assert find("input of the projection").each == 2
    assert find("input of the output projection").each == 1
    (only,) = account("M").eight_bit_linears(shared, layout.shard(shared), 2)
    assert only == (12, 16)


def test_prediction_heads_join_state_and_token_in_8_bits():
    def joined(settings):
        lines = mtp_inner_saved(parse("M/*"), SMALL, Layout(), settings)
        return sum(line.bytes for line in lines if "state and token" in line.name)

    assert joined(BF16) == 2 * joined(TENSORWISE) > 0


def test_weights_have_two_copies_in_8_bits():
    """An FFN of 20 with a gate: 16 x 40 and 20 x 16; M: 61 rows, 64 with padding, and 24 columns."""
    pattern, layout = parse("M-"), Layout()
    assert eight_bit_weights(pattern, SMALL, layout, 0) == 16 * 40 + 20 * 16 + 64 * 16 + 24 * 16
    plain, quantised = Storage(), Storage(eight_bit=2)
    held, more = (rank_memory(pattern, SMALL, layout, of, 0) for of in (plain, quantised))
    assert more.parameters - held.parameters == 2 * eight_bit_weights(pattern, SMALL, layout, 0)
    assert (more.gradients, more.optimizer) == (held.gradients, held.optimizer)


def test_the_last_stage_has_the_prediction_heads_weights():
    pattern, layout = parse("-|-/-"), Layout(pp=2)
    first, last = (eight_bit_weights(pattern, SMALL, layout, stage) for stage in (0, 1))
    assert last - first == first + 2 * 16 * 16


def test_each_expert_has_its_copies():
    pattern = parse("E")
    gated = 16 * SMALL.expert_ffn * (1 + SMALL.gated) + SMALL.expert_ffn * 16
    shared = 16 * SMALL.shared_ffn * (1 + SMALL.gated) + SMALL.shared_ffn * 16
    assert eight_bit_weights(pattern, SMALL, Layout(), 0) == SMALL.experts * gated + shared
    met = account("E").eight_bit_flops(SMALL, 1)
    assert met == 2 * (SMALL.topk * gated + shared) < 2 * weights(account("E").eight_bit_linears(SMALL, SMALL, 1))


def test_sequence_parallel_ranks_gather_8_bits():
    """The input twice, and the output's gradient: 1 byte; the sums on the way out and back stay in bf16."""
    layout = Layout(tp=2, sequence_parallel=True)
    plain, less = (
        layer_communication("-", SMALL, layout, CommunicationSettings(operand=operand))["tensor"]
        for operand in (None, 1.0)
    )
    assert plain.calls == less.calls == 5
    assert plain.bytes - less.bytes == 3 * 10 * 16 / 2
    apart = replace(layout, sequence_parallel=False)
    assert (
        layer_communication("-", SMALL, apart, CommunicationSettings())["tensor"]
        == layer_communication("-", SMALL, apart, CommunicationSettings(operand=1.0))["tensor"]
    )


@pytest.mark.parametrize("recipe", SCALES)
def test_settings_of_arguments(recipe):
    args = SimpleNamespace(bf16=True, fp8="hybrid", fp8_recipe=recipe)
    assert ActivationSettings.from_args(args).eight_bit == recipe
    assert Storage.from_args(args).eight_bit == 2
    assert CommunicationSettings.from_args(args).operand == (1 + 4 / 128 if recipe == "blockwise" else 1)
    plain = SimpleNamespace(bf16=True, fp8=None, fp8_recipe=recipe)
    assert ActivationSettings.from_args(plain).eight_bit is None
    assert (Storage.from_args(plain).eight_bit, CommunicationSettings.from_args(plain).operand) == (0, None)


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_what_is_not_counted_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} with --fp8-format .* not counted here. Drop one"):
        eight_bit_recipe(SimpleNamespace(fp8="hybrid", **{name: True}))
    assert eight_bit_recipe(SimpleNamespace(fp8=None, **{name: True})) is None
