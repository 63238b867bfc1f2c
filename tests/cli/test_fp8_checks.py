"""Rules of --fp8-format, on arguments as Megatron parses them."""

import copy
import functools

import pytest

from megatron_hybrid.cli import fp8_checks
from megatron_hybrid.plan.subject import read

LINE = "--recipe paper-1b-intra --backend te --fp8-format hybrid --fp8-recipe tensorwise"


@functools.cache
def base():
    """Not made when the file is imported: the CPU engine, which stands in for a GPU here, stays in a process."""
    return read(LINE.split(), 1).args


def changed(**values):
    args = copy.copy(base())
    vars(args).update({"device_capability": None, **values})
    return args


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device_capability": (8, 0)}, "tensorwise needs a GPU of capability 8.9.* 8.0: drop --fp8-format"),
        ({"fp8_recipe": "blockwise", "device_capability": (8, 9)}, "9.0, .*: use --fp8-recipe tensorwise or delayed"),
        ({"fp8_recipe": "mxfp8", "device_capability": (9, 0)}, "10.0, .* tensorwise or delayed or blockwise"),
        ({"seq_length": 8200}, "8200 tokens on each rank"),
        ({"context_parallel_size": 2, "world_size": 2, "seq_length": 8208}, "4104 tokens on each rank"),
        ({"ffn_hidden_size": 8200}, "- layers have a linear of 8200 x 2048"),
        ({"intra_value_dim": 1992, "intra_num_attention_heads": 1, "intra_num_query_groups": 1}, "P layers"),
        ({"fp8_param_gather": True}, "--fp8-param-gather .* P layers.* no rows can be added. Drop it"),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute .* P layers"),
    ],
)
def test_what_8_bit_products_do_not_take(values, said):
    with pytest.raises(ValueError, match=said):
        fp8_checks.check(changed(**values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"device_capability": (9, 0), "fp8_recipe": "blockwise"},
        {"device_capability": (8, 9)},
        {"hybrid_layer_pattern": "M-", "fp8_param_gather": True},  # M of this width needs no padding
        {"seq_length": 8208},
        {"moe_latent_size": 8},  # what costs do not know is not refused for that
    ],
)
def test_what_they_take(values):
    fp8_checks.check(changed(**values))


def test_products_of_mixers_are_padded():
    """4,096 z and x, 256 B and C and 32 dt are 16 x 530; P's 6,834 rows are 6,848."""
    from megatron_hybrid import costs
    from megatron_hybrid.layers.registry import LAYERS

    sizes = costs.sizes_of(base())
    shapes = {symbol: LAYERS[symbol].account.eight_bit_linears(sizes, sizes, 1)[0] for symbol in "MP"}
    assert shapes == {"M": (2048, 8480), "P": (2048, 6848)}
    assert [LAYERS[symbol].account.linears(sizes)[0][1] for symbol in "MP"] == [8480, 6834]
