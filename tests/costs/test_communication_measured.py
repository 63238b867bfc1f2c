"""The formulas of communication against what ranks send, exactly: ``==`` of calls and bytes, group by group."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.training import Run

# What the ranks run ---------------------------------------------------------------------------------

Sent = dict[str, tuple[int, float]]
"""Group to calls and bytes."""

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
    "EMBEDDING_GROUP": "embedding",
}
"""Megatron's names. Losses, norms and numbers of tokens are summed over other groups, but one: see ``Recorder``."""

WHOLE = {
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "alltoall_base_": 1,
    "send": 0,
}
"""torch's collectives, and which of their arguments is the whole: what all ranks have together, or what goes out."""


LOSS = (("data", "allreduce_"), ("context", "allreduce_"))


class Recorder(TorchDispatchMode):
    """Adds up what this rank's collectives send while it is active, autograd's among them.

    Left out is what the formulas leave out: broadcasts of batches, lists of gathered indices, and the loss: plain
    all-reduces over the replicas and, of its tokens, over context-parallel ranks (gradients and parameters go in
    coalesced ones).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in WHOLE:
            kind = func._opname
            group = next(_process_group(a) for a in args if isinstance(a, torch.ScriptObject) and _process_group(a))
            name = GROUPS.get(group.group_desc)
            if kind == "send" and args[0][0].dim() == 3:
                # of two stages the second sends over the group of all ranks (p2p_communication.py, _p2p_ops)
                name = "pipeline"
            if name and group.size() > 1 and (name, kind) not in LOSS:
                self._add(name, kind, _bytes(args[WHOLE[kind]]), group.size())
        return func(*args, **(kwargs or {}))

    def _add(self, group: str, kind: str, whole: int, ranks: int) -> None:
        share = {"send": 1.0, "allreduce_": 2 * (ranks - 1) / ranks, "allreduce_coalesced_": 2 * (ranks - 1) / ranks}
        sent = whole * share.get(kind, (ranks - 1) / ranks)
        if group == "expert tensor" and kind == "allreduce_":
            # Gloo cannot gather or scatter unequal parts; patches/gloo.py sums the whole in their place
            sent /= 2
        calls, total = self.sent.get(group, (0, 0))
        self.sent[group] = calls + 1, total + sent


def _process_group(value: Any) -> Any:
    try:
        return torch.distributed.ProcessGroup.unbox(value)
    except RuntimeError:  # another kind of object, such as the operation of a reduction
        return None


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(t) for t in tensors)


def of_layers(symbols: str, flags: str) -> list[tuple[Sent, Sent]]:
    """What this rank sends for one micro-batch through a layer, forward and backward: measured, and by formula.

    Args:
        symbols: The layers, each for itself.
    """
    from megatron.core.utils import unwrap_model

    from megatron_hybrid.costs.communication import layer_communication

    run = Run(symbols, flags)
    args, (model,) = run.args, unwrap_model(run.model)
    shares = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    found = []
    for symbol, layer in zip(symbols, model.decoder.layers, strict=True):
        x = torch.randn(
            args.seq_length // shares, args.micro_batch_size, args.hidden_size, dtype=args.params_dtype
        ).requires_grad_()
        with Recorder() as recorder:
            y = layer.train()(hidden_states=x, attention_mask=None)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.randn_like(y))
        found.append((recorder.sent, _plain(layer_communication(symbol, *_described(args)))))
    return found


def of_a_step(pattern: str, flags: str) -> tuple[Sent, Sent]:
    """What this rank sends in a training step: measured, and by formula."""
    from megatron.core import mpu

    from megatron_hybrid.costs.communication import step_communication
    from megatron_hybrid.pattern import parse

    run = Run(pattern, flags)
    run.step()  # the first step does what later ones do not
    with Recorder() as recorder:
        run.step()
    stage = mpu.get_pipeline_model_parallel_rank()
    counted = step_communication(parse(run.args.hybrid_layer_pattern), *_described(run.args), stage)
    return recorder.sent, _plain(counted)


def _described(args: Any) -> tuple[Any, Any, Any]:
    from megatron_hybrid.accounting.traffic import CommunicationSettings
    from megatron_hybrid.costs import Layout, sizes_of

    return sizes_of(args), Layout.from_args(args), CommunicationSettings.from_args(args)


def _plain(counted: dict[Any, Any]) -> Sent:
    return {group: (traffic.calls, traffic.bytes) for group, traffic in counted.items() if traffic.calls}


# Tests ----------------------------------------------------------------------------------------------

TP = "--tensor-model-parallel-size 2 --micro-batch-size 2"
SP = f"{TP} --sequence-parallel"
CP = "--context-parallel-size 2"


def compare(found: list[tuple[Sent, Sent]], wanted_groups: set[str]) -> None:
    """Each rank's numbers; of experts the mean of the ranks: which tokens they get is the router's choice."""
    assert set().union(*(measured for measured, _ in found)) == wanted_groups
    for group in wanted_groups:
        measured, counted = ([one.get(group, (0, 0)) for one in side] for side in zip(*found, strict=True))
        if "expert" in group and "data" not in group:
            measured, counted = ([tuple(map(sum, zip(*side, strict=True)))] for side in (measured, counted))
        assert measured == counted, group


@pytest.mark.parametrize(
    "symbols, flags, groups",
    [
        ("*WMPEG-", SP, {"tensor"}),
        ("*WMPG", CP, {"context"}),
        # fewer key heads, groups of B and C, groups of norms than ranks
        ("*WMP-", f"{TP} --num-query-groups 1 --mamba-num-groups 1 --intra-norm-groups 1", {"tensor"}),
        ("MP", f"{SP} --mamba-num-groups 1 --intra-norm-groups 1 --hybrid-recompute ssm intra", {"tensor"}),
        ("MP", f"{CP} --mamba-num-groups 1 --intra-value shared --hybrid-recompute ssm intra", {"context"}),
        ("P", f"{CP} --intra-preset diff-transformer", {"context"}),
        ("E", "--expert-model-parallel-size 2 --moe-router-topk 3 --bf16", {"expert"}),
    ],
)
def test_layers(ranks, symbols, flags, groups):
    found = ranks(2).run(of_layers, symbols=symbols, flags=flags)
    for symbol, *of_one_layer in zip(symbols, *found, strict=True):
        compare(of_one_layer, groups | ({"expert tensor"} if symbol == "E" and flags == SP else set()))


FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"


@pytest.mark.parametrize(
    "pattern, flags, groups",
    [
        (
            "*-E",
            f"{SP} --untie-embeddings-and-output-weights --cross-entropy-loss-fusion --expert-tensor-parallel-size 1 "
            "--expert-model-parallel-size 2 --moe-shared-expert-gate",
            {"tensor", "expert"},
        ),
        ("*-/M", f"{TP} --mtp-num-layers 1 --loss-kernel fused", {"tensor"}),
        ("*-", f"{SP} --loss-kernel fused", {"tensor"}),
        ("*P/M", f"{TP} --mtp-num-layers 1 --mamba-num-groups 1 --intra-scale scalar", {"tensor"}),
        ("M-/*-", f"{SP} --mtp-num-layers 1 {FULL} uniform", {"tensor"}),
        ("GM/-", f"{SP} --mtp-num-layers 1 {FULL} block", {"tensor"}),
        ("*W-", f"{CP} --recompute-granularity selective --recompute-modules core_attn", {"context", "data"}),
        ("*PM", "--use-distributed-optimizer --bf16 --overlap-param-gather --overlap-grad-reduce", {"data"}),
        ("*E", "--use-distributed-optimizer --expert-model-parallel-size 2", {"data", "expert"}),
        ("*|M|-|W", "--pipeline-model-parallel-size 2", {"pipeline", "embedding"}),
        (
            "*|-/*",
            "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights --mtp-num-layers 1",
            {"pipeline", "embedding"},
        ),
    ],
)
def test_steps(ranks, pattern, flags, groups):
    compare(ranks(2).run(of_a_step, pattern=pattern, flags=flags), groups)


def test_tensor_expert_and_pipeline_parallel_ranks_together(ranks):
    flags = f"{SP} --pipeline-model-parallel-size 2 --expert-tensor-parallel-size 1 --expert-model-parallel-size 2"
    found = ranks(4).run(of_a_step, pattern="*|M|E|W", flags=flags)
    compare(found, {"tensor", "expert", "pipeline", "embedding"})
