"""Bytes of parameters, gradients and optimizer state on each rank: those that costs/ counts, and real models'."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.training import Run

# What the ranks run ---------------------------------------------------------------------------------


def measured_and_counted(pattern: str, flags: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sets up a model, trains one step, and counts.

    Returns:
        Bytes of ``parameters``, ``gradients`` and ``optimizer`` on this rank: measured, as the storages of the tensors;
        counted for this rank; and those of the largest one. And by ``stage`` the number of parameters, twice.
    """
    import torch
    from megatron.core import mpu

    from megatron_hybrid import costs
    from megatron_hybrid.accounting.storage import Storage
    from megatron_hybrid.costs import memory
    from megatron_hybrid.pattern import parse

    run = Run(pattern, flags)
    run.step()
    model = [p for chunk in run.model for p in chunk.parameters()]
    buffers = [b for chunk in run.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    measured = {
        "parameters": _bytes(model),
        "gradients": _bytes(b.grad_data for b in buffers),
        "optimizer": _bytes(_optimizer_tensors(run.optimizer), besides=model),
        "count": sum(p.numel() for p in model),
    }
    args = run.args
    what = parse(args.hybrid_layer_pattern), costs.sizes_of(args), costs.Layout.from_args(args)
    stage = mpu.get_pipeline_model_parallel_rank()
    # Megatron's order of ranks has the pipeline outside of all others
    rank = torch.distributed.get_rank() % (what[2].world // what[2].pp)
    found = memory.rank_memory(*what, Storage.from_args(args), stage, rank)
    largest = memory.largest_rank(*what, Storage.from_args(args))
    counted = {**_as_dict(found), "count": memory.stage_parameters(*what, stage).total}
    return measured, counted, _as_dict(largest)


def _as_dict(found: Any) -> dict[str, int]:
    return {name: getattr(found, name) for name in ("parameters", "gradients", "optimizer")}


def _optimizer_tensors(optimizer: Any) -> Iterable[Any]:
    """Main parameters and state of an optimizer made of several."""
    import torch

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (t for t in state.values() if torch.is_tensor(t))


def _bytes(tensors: Iterable[Any], besides: Iterable[Any] = ()) -> int:
    """Of the storages of tensors, each once, without those of others."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    others = {t.untyped_storage().data_ptr() for t in besides}
    return sum(size for start, size in storages.items() if start not in others)


# Tests ----------------------------------------------------------------------------------------------

DISTRIBUTED = "--use-distributed-optimizer"
SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
UNTIED = "--untie-embeddings-and-output-weights"
EXPERTS = "--expert-model-parallel-size 2"
BUCKETS = "--overlap-grad-reduce --ddp-bucket-size 5000"
LAMBDAS = "--intra-preset diff-transformer"
COMMON = "--mamba-num-groups 1 --num-query-groups 1 --intra-num-query-groups 1 --intra-scale gate"
"""Fewer groups than tensor-parallel ranks: rows and channels that all of them hold."""

# Every kind of layer; widths of 8 to 168 elements, so that alignment pads many of the tensors
CASES = {
    "one rank": (1, "MP*-EGW", "--optimizer sgd --sgd-momentum 0 --bf16"),
    "momentum": (1, "*-W-", f"--optimizer sgd --add-qkv-bias {UNTIED}"),
    "tensor parallel": (2, "MP*-EGW/*-", SEQUENCE),
    "pipeline, tied, MTP": (2, "MP*E|-GW/*-/*-", f"{PIPELINE} {DISTRIBUTED}"),
    "pipeline, tied": (2, "M*|-W", f"{PIPELINE} --bf16"),
    "pipeline, untied, MTP": (2, "MP*E|-GW/*-/*-", f"{PIPELINE} {UNTIED} --bf16 --mtp-use-repeated-layer"),
    "experts": (2, "*E-E", f"{EXPERTS} {DISTRIBUTED}"),
    "replicas": (2, "MP*-EGW/*-", f"{DISTRIBUTED} --bf16"),
    "16-bit gradients": (
        2,
        "MP*-EGW/*-",
        f"{DISTRIBUTED} --bf16 --grad-reduce-in-bf16 {LAMBDAS}",
    ),
    "fp16": (2, "PP-W", f"{DISTRIBUTED} --fp16 --initial-loss-scale 1 --intra-preset hymba"),
    "buckets": (2, "MP*-EGW", f"{DISTRIBUTED} --bf16 {BUCKETS}"),
    "number of buckets": (
        2,
        "MP*-EGW",
        f"{DISTRIBUTED} --overlap-grad-reduce --ddp-num-buckets 3 --ddp-pad-buckets-for-high-nccl-busbw",
    ),
    "context parallel": (2, "MP*-EW", f"{DISTRIBUTED} --context-parallel-size 2"),
    "few groups": (4, "MP*EG", "--tensor-model-parallel-size 4 --sequence-parallel"),
    "rows in common": (4, "MP*EG", f"{SEQUENCE} {COMMON} {DISTRIBUTED} {EXPERTS} --expert-tensor-parallel-size 1"),
    "tensor and pipeline": (4, "M*E|-GW/*-", f"{SEQUENCE} {PIPELINE} {DISTRIBUTED} --bf16"),
    "segments": (4, "*E|-E|*E|-E/*E", f"{PIPELINE} {EXPERTS} {DISTRIBUTED} {BUCKETS} --bf16"),
    "instances": (4, "*E*E", f"{EXPERTS} {DISTRIBUTED} --num-distributed-optimizer-instances 2"),
}


@pytest.mark.parametrize("name", CASES)
def test_counted_bytes_are_those_of_the_real_model(ranks, name):
    size, pattern, flags = CASES[name]
    found = ranks(size).run(measured_and_counted, pattern=pattern, flags=flags)
    for rank, (measured, counted, _) in enumerate(found):
        assert counted == measured, f"rank {rank}"
    of_bytes = [{k: v for k, v in measured.items() if k != "count"} for measured, _, _ in found]
    largest = found[0][2]
    assert largest in of_bytes
    assert sum(largest.values()) == max(sum(of.values()) for of in of_bytes)
    if name == "replicas":  # a guard of the cases: shards of the distributed optimizer differ, or order is not tested
        assert of_bytes[0]["optimizer"] != of_bytes[1]["optimizer"]
