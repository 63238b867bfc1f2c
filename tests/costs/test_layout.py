"""Layouts from arguments, and what pipeline stages hold."""

from types import SimpleNamespace

import pytest

from megatron_hybrid.costs import Layout, Stage, stages
from megatron_hybrid.pattern import parse


def layout(**settings):
    return Layout.from_args(SimpleNamespace(**settings))


def test_defaults_are_one_rank():
    assert layout() == Layout()
    assert layout(sequence_parallel=True).sequence_parallel is False  # one tensor-parallel rank has nothing to split


def test_ranks_divide_into_replicas_and_micro_batches():
    found = layout(
        world_size=48,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        context_parallel_size=3,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        micro_batch_size=2,
        global_batch_size=24,
        hybrid_layer_pattern="M-|M-|*-|M-/M|",
    )
    assert (found.tp, found.pp, found.cp, found.dp, found.world) == (2, 2, 3, 4, 48)
    assert (found.vpp, found.sequence_parallel) == (2, True)
    assert (found.micro_batches, found.expert_dp) == (3, 6)
    assert found.tokens(300) == 200


def test_batch_and_experts_have_megatrons_defaults():
    found = layout(world_size=8, tensor_model_parallel_size=2, micro_batch_size=3)
    assert (found.global_batch, found.etp, found.expert_dp) == (12, 2, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"world_size": 6, "tensor_model_parallel_size": 4}, "6 processes do not divide"),
        ({"world_size": 4, "micro_batch_size": 2, "global_batch_size": 12}, "12 is no multiple"),
    ],
)
def test_layouts_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        layout(**settings)


def test_segments_are_dealt_out_in_turn():
    assert stages(parse("M-|*-|E|W/M"), 2) == [
        Stage(("M-", "E"), first=True, last=False),
        Stage(("*-", "W"), first=False, last=True),
    ]
    assert stages(parse("M-*-"), 2) == [Stage(("M-",), True, False), Stage(("*-",), False, True)]
    with pytest.raises(ValueError, match="do not divide"):
        stages(parse("M-*"), 2)
