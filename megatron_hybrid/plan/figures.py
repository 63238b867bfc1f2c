"""Everything that a plan says, as plain values that JSON can hold."""

from typing import Any

from megatron_hybrid import costs
from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.costs.activations import activation_table, stage_activation_bytes
from megatron_hybrid.costs.caches import CONTEXT_LENGTHS, layer_cache, model_cache
from megatron_hybrid.costs.communication import step_communication
from megatron_hybrid.costs.memory import rank_memory
from megatron_hybrid.costs.schedule import pipeline_bubble
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import Pattern
from megatron_hybrid.plan.subject import Subject
from megatron_hybrid.plan.time import Machine, step_time

Figures = dict[str, Any]


def figures(subject: Subject, machine: Machine | None = None) -> Figures:
    """What a run costs.

    Returns:
        Parameters as counts, FLOPs as training FLOPs (forward and backward) in both conventions, caches in bytes of one
        sequence in bfloat16, work of pipeline stages as a share, memory in bytes, messages in bytes that a rank sends
        in a step; with a machine, seconds of a step and what follows from it.

    Raises:
        ValueError: Something in the flags is not counted.
    """
    s, layout = subject, subject.layout
    found = {
        "name": s.name,
        "pattern": str(s.pattern),
        "layout": _layout(s),
        "sequence_length": s.sizes.seq_length,
        "tokens": s.tokens,
        "parameters": _parameters(s),
        "parts": _parts(s),
        "flops": {convention: _flops(s, convention) for convention in ("model", "paper")},
        "cache": _cache(s),
        "pipeline": _pipeline(s, layout),
        "memory": memory(s),
        "activations": _activations(s),
        "implementation": _implementation(s),
        "communication": _communication(s),
    }
    return found | {"machine": _machine(machine), "time": times(s, machine)} if machine else found


def _machine(machine: Machine) -> Figures:
    return {"gpu": machine.title, "memory": machine.memory, "limit": machine.limit}


def _implementation(s: Subject) -> Figures:
    """What activations are counted for."""
    settings = ActivationSettings.from_args(s.args)
    again = settings.recompute
    return {
        "backend": settings.backend,
        "scan": settings.ssm_kernels if settings.device == "cuda" else "torch",
        "loss": "fused" if settings.fused_loss else "plain",
        "recompute": again.method or sorted(again.modules),
    }


def memory(s: Subject) -> list[Figures]:
    """Bytes on the fullest rank of each pipeline stage."""
    storage, settings = Storage.from_args(s.args), ActivationSettings.from_args(s.args)
    rows = []
    for stage in range(s.layout.pp):
        held = rank_memory(s.pattern, s.sizes, s.layout, storage, stage)
        kept = stage_activation_bytes(s.pattern, s.sizes, s.layout, settings, stage)
        rows.append(
            {
                "parameters": held.parameters,
                "gradients": held.gradients,
                "optimizer": held.optimizer,
                "activations": kept,
                "total": held.total + kept,
            }
        )
    return rows


def _activations(s: Subject) -> Figures:
    """Bytes that one micro-batch keeps on one rank, by part of the model."""
    return activation_table(s.pattern, s.sizes, s.layout, ActivationSettings.from_args(s.args))


def _communication(s: Subject) -> Figures:
    """Calls and bytes that a rank sends in a step, by group: of the pipeline stage that sends most."""
    settings = CommunicationSettings.from_args(s.args)
    sent = [step_communication(s.pattern, s.sizes, s.layout, settings, stage) for stage in range(s.layout.pp)]
    most = max(sent, key=lambda by_group: sum(t.bytes for t in by_group.values()))
    return {group: {"calls": t.calls, "bytes": t.bytes} for group, t in most.items() if t.calls}


def times(s: Subject, machine: Machine) -> Figures:
    """Seconds of a step and what follows from it."""
    step = step_time(s, machine)
    tokens = s.layout.global_batch * s.sizes.seq_length
    flops = costs.training_flops(s.pattern, s.sizes, s.layout.global_batch)
    achieved = flops / step.total / s.layout.world
    return {
        "gpu": machine.title,
        "peak_flops": machine.peak,
        "efficiency": machine.efficiency,
        "step": step.total,
        "compute": step.compute,
        "messages": step.messages,
        "bubble": step.bubble,
        "data": step.data,
        "optimizer": step.optimizer,
        "tokens_per_second": tokens / step.total,
        "tokens_per_day": tokens / step.total * 86400,
        "flops_per_gpu": achieved,
        "mfu": achieved / machine.peak,
        "days": s.tokens / tokens * step.total / 86400 if s.tokens else None,
    }


def _layout(s: Subject) -> Figures:
    layout = s.layout
    return {
        "gpus": layout.world,
        "tensor": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline": layout.pp,
        "segments_per_stage": layout.vpp,
        "context": layout.cp,
        "expert": layout.ep,
        "expert_tensor": layout.etp,
        "data": layout.dp,
        "micro_batch": layout.micro_batch,
        "global_batch": layout.global_batch,
        "micro_batches": layout.micro_batches,
    }


def _parameters(s: Subject) -> Figures:
    found = costs.model_parameters(s.pattern, s.sizes)
    return {
        "total": found.total,
        "active": found.active,
        "embedding": found.embedding,
        "non_embedding": found.non_embedding,
        "active_non_embedding": found.active_non_embedding,
    }


def _parts(s: Subject) -> list[Figures]:
    """A row for each layer type, and for what is no layer; parameters and FLOPs add up to the model's."""
    rows = []
    for symbol in LAYERS:
        count = s.pattern.layers.count(symbol)
        if count:
            found = costs.layer_parameters(symbol, s.sizes)
            flops = 3 * costs.layer_flops_per_token(symbol, s.sizes)
            rows.append(_part(symbol, LAYERS[symbol].name, count, found.total, found.active, flops))
    embedding = s.sizes.padded_vocab * s.sizes.hidden
    rows.append(_part("", "embedding", 1, embedding, embedding, 0.0))
    head = 0 if s.sizes.tied else embedding
    name = "output head" + (", weights of the embedding" if s.sizes.tied else "")
    rows.append(_part("", name, 1, head, head, 3 * costs.head_flops_per_token(s.sizes)))
    norm = s.sizes.hidden * (1 + s.sizes.layer_norm)
    rows.append(_part("", "final norm", 1, norm, norm, 0.0))
    if s.pattern.mtp_depths:
        whole, main = (costs.model_parameters(p, s.sizes) for p in (s.pattern, Pattern(s.pattern.segments)))
        flops = 3 * costs.mtp_flops_per_token(s.pattern, s.sizes)
        sets = 1 if s.sizes.mtp_repeated else s.pattern.mtp_depths
        total, active = whole.total - main.total, whole.active - main.active
        rows.append(_part("/", "MTP heads", sets, total // sets, active // sets, flops / sets))
    return rows


def _part(symbol: str, name: str, count: int, each: int, active: int, flops: float) -> Figures:
    return {
        "symbol": symbol,
        "name": name,
        "count": count,
        "parameters_each": each,
        "parameters": count * each,
        "active": count * active,
        "training_flops_per_token": count * flops,
    }


def _flops(s: Subject, convention: costs.Convention) -> Figures:
    per_token = costs.training_flops_per_token(s.pattern, s.sizes, convention)
    return {
        "per_token": per_token,
        "per_sample": per_token * s.sizes.seq_length,
        "run": per_token * s.tokens if s.tokens else None,
    }


def _cache(s: Subject) -> Figures:
    """Bytes of one sequence in bfloat16 by context length: of each layer type (all its layers), and in total."""
    kinds = [symbol for symbol in LAYERS if symbol in s.pattern.layers and LAYERS[symbol].kind == "mixer"]
    return {
        "lengths": list(CONTEXT_LENGTHS),
        "layers": {
            symbol: [s.pattern.layers.count(symbol) * layer_cache(symbol, s.sizes, n).size() for n in CONTEXT_LENGTHS]
            for symbol in kinds
        },
        "total": [model_cache(s.pattern, s.sizes, n).size() for n in CONTEXT_LENGTHS],
    }


def _pipeline(s: Subject, layout: costs.Layout) -> Figures:
    """Each stage's layers and share of the work, and what unequal stages and the schedule's bubble cost."""
    work = costs.stage_work(s.pattern, s.sizes, layout.pp)
    each = [segment.total for segment in costs.segment_work(s.pattern, s.sizes)]
    held = costs.stages(s.pattern, layout.pp)
    return {
        "stages": [
            {"layers": "|".join(stage.segments), "beside": _beside(s, stage), "share": w / sum(work)}
            for stage, w in zip(held, work, strict=True)
        ],
        "imbalance": costs.imbalance(work),
        "bubble": pipeline_bubble(each, [2 * w for w in each], layout.micro_batches, layout.vpp),
    }


def _beside(s: Subject, stage: costs.Stage) -> list[str]:
    """What a stage holds beside its layers."""
    heads = [f"{s.pattern.mtp_depths} x /{s.pattern.mtp}"] if s.pattern.mtp_depths else []
    return ["embedding"] * stage.first + [*heads, "output head"] * stage.last
