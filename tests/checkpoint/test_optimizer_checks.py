"""Which checkpoints' optimizer states a run takes, going by the flags of both."""

from argparse import Namespace

import pytest

from megatron_hybrid.checkpoint.optimizer_checks import check_optimizer_state

SAVED = {
    "optimizer": "adam",
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
    "no_save_optim": None,
    "bf16": True,
    "fp16": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "hybrid_layer_pattern": "M-*-",
    "overlap_grad_reduce": False,
    "num_distributed_optimizer_instances": 1,
    "ddp_bucket_size": None,
    "data_parallel_size": 1,
}
PLAIN, BUCKETS = {"use_distributed_optimizer": False}, {"dist_ckpt_optim_fully_reshardable": False}
TP2 = {"tensor_model_parallel_size": 2}


def refusal(saved: dict, asked: dict) -> str:
    """What is said of a run with flags ``asked`` that loads a checkpoint with ``saved``; nothing if it may."""
    try:
        check_optimizer_state(Namespace(**SAVED | asked), Namespace(**SAVED | saved), "runs/iter_0000002")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        ({}, TP2),
        ({}, {"bf16": False}),
        (PLAIN, {**PLAIN, **TP2, "expert_model_parallel_size": 2}),
        (BUCKETS, {"data_parallel_size": 2}),
    ],
)
def test_what_loads_is_let_through(saved, asked):
    assert refusal(saved, asked) == ""


@pytest.mark.parametrize(
    ("saved", "asked", "said"),
    [
        (PLAIN, {}, "adam in bf16 without --use-distributed-optimizer, and this run is by --optimizer adam with"),
        ({}, PLAIN, "adam with --use-distributed-optimizer, and this run is by --optimizer adam in bf16 without"),
        (PLAIN, {**PLAIN, "bf16": False}, "adam in bf16 without --use-distributed-optimizer, and this run is by"),
        (PLAIN, {**PLAIN, "optimizer": "sgd"}, "and this run is by --optimizer sgd in bf16"),
        (BUCKETS, TP2, "--tensor-model-parallel-size 2, not 1"),
        (BUCKETS, {"hybrid_layer_pattern": "M-|*-"}, "--hybrid-layer-pattern M-|*-, not M-*-"),
        (BUCKETS, {"overlap_grad_reduce": True, "data_parallel_size": 2}, "--data-parallel-size 2, not 1"),
        ({"no_save_optim": True}, {}, "has no optimizer state"),
    ],
)
def test_what_does_not_load_is_refused_with_the_ways_on(saved, asked, said):
    text = refusal(saved, asked)
    assert said in text
    assert "--no-load-optim" in text and "\n" not in text


def test_checkpoints_of_an_older_megatron_are_left_to_it():
    older = Namespace(use_distributed_optimizer=True)
    check_optimizer_state(Namespace(**SAVED), older, "runs/iter_0000002")
