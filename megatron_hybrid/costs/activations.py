"""Bytes that forward passes keep for backward passes on one rank: of a layer, a micro-batch, and a stage at its peak.

Counted is what autograd keeps, storage by storage (:mod:`megatron_hybrid.costs.saved_tensors` has the tables and says
which of them are measured). Not counted is what lives within one operation: gradients of activations, buffers of
collectives, the allocator's fragments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_hybrid.costs import saved_tensors
from megatron_hybrid.costs.layout import Layout, Stage, stages
from megatron_hybrid.costs.saved_tensors import FP32, ActivationSettings, Rank, Saved
from megatron_hybrid.costs.schedule import in_flight
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.pattern import Pattern

MODULES = ("core_attn", "mlp", "moe", "shared_experts")
"""Of --recompute-modules, those that are counted."""


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward pass."""

    method: str | None = None
    """Of full recomputation, ``uniform`` or ``block``; None: there is none."""
    layers: int = 1
    """uniform: in each group; block: recomputed ones of each segment, one by one."""
    modules: frozenset[str] = frozenset()
    """core_attn, mlp, moe, shared_experts; ssm, intra (--hybrid-recompute)."""
    distribute: bool = False
    """Inputs of recomputed groups are split over the tensor-parallel ranks."""

    @classmethod
    def from_args(cls, args: Any) -> "Recompute":
        """As Megatron's arguments and ours say; absent ones have their default.

        Raises:
            ValueError: A module is not counted, or full recomputation has no method.
        """

        def get(name: str, default: Any = None) -> Any:
            value = getattr(args, name, None)
            return default if value is None else value

        modules = set(get("hybrid_recompute", ()))
        if get("moe_layer_recompute", False):
            modules.add("moe")
        granularity = get("recompute_granularity")
        if granularity == "selective":
            chosen = get("recompute_modules", ["core_attn"])
            unknown = sorted(set(chosen) - set(MODULES))
            if unknown:
                raise ValueError(
                    f"--recompute-modules {' '.join(unknown)} is not counted here: counted are {' '.join(MODULES)}."
                )
            modules |= set(chosen)
        method = get("recompute_method") if granularity == "full" else None
        if granularity == "full" and method not in ("uniform", "block"):
            raise ValueError(f"--recompute-method {method}: full recomputation is uniform or block.")
        layers = get("recompute_num_layers", 1)
        return cls(method, layers, frozenset(modules), bool(get("distribute_saved_activations", False)))


@dataclass(frozen=True, kw_only=True)
class Activations(ActivationSettings):
    """All settings that activation memory depends on, beside sizes and layout."""

    recompute: Recompute = Recompute()

    @classmethod
    def from_args(cls, args: Any) -> "Activations":
        """As Megatron's arguments and ours say; ``auto`` is CUDA, and on CUDA Transformer Engine.

        Raises:
            ValueError: A setting is not counted.
        """

        def get(name: str, default: Any = None) -> Any:
            value = getattr(args, name, None)
            return default if value is None else value

        device = get("device", "auto")
        device = "cuda" if device == "auto" else device
        backend = get("backend", "auto")
        pattern = get("hybrid_layer_pattern", "")
        _refuse(args, device, pattern)
        recompute = Recompute.from_args(args)
        return cls(
            bytes_each=2 if get("bf16", False) or get("fp16", False) else 4,
            device=device,
            backend={"auto": "te" if device == "cuda" else "torch"}.get(backend, backend),
            rope=get("position_embedding_type", "learned_absolute") == "rope",
            dropout=get("hidden_dropout", 0.1) > 0,
            packed=bool(get("reset_attention_mask", False)),
            fused_activation=bool(get("bias_swiglu_fusion", True)),
            modules=recompute.modules,
            recompute=recompute,
        )


def _refuse(args: Any, device: str, pattern: str) -> None:
    def asked(name: str) -> Any:
        return getattr(args, name, None)

    refused = {
        "fp8": "quantised activations",
        "fp4": "quantised activations",
        "cpu_offloading": "activations on the host",
        "fine_grained_activation_offloading": "activations on the host",
        "fp32_residual_connection": "an fp32 residual",
        "qk_layernorm": "norms of queries and keys",
        "attention_output_gate": "gates of attention",
    }
    for name, what in refused.items():
        if asked(name):
            raise ValueError(f"--{name.replace('_', '-')}: activation memory of {what} is not counted. Leave it out.")
    if device == "cpu" and set(pattern) & set("*WP") and (asked("attention_dropout") or 0) > 0:
        raise ValueError(
            f"--attention-dropout {asked('attention_dropout')} on CPU stores the scores, which is not counted: set 0."
        )
    if device == "cpu" and asked("reset_attention_mask"):
        raise ValueError("--reset-attention-mask: activation memory of packed documents on CPU is not counted.")
    if "E" in pattern and asked("moe_token_dispatcher_type") == "allgather":
        raise ValueError(
            "--moe-token-dispatcher-type allgather: its activation memory is not counted. Use alltoall, which is "
            "smaller too."
        )


# One micro-batch ---------------------------------------------------------------------------------


def layer_saved(symbol: str, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """The table of one layer, with selective recomputation; full recomputation is of a stage.

    Args:
        sizes: Of the whole model.
    """
    return saved_tensors.layer(symbol, Rank(sizes, layout, settings))


def layer_activation_bytes(symbol: str, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> int:
    """Bytes that one layer keeps of one micro-batch on one rank; see :func:`layer_saved`."""
    return total(layer_saved(symbol, sizes, layout, settings))


def embedding_saved(sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """Ids; with tensor parallelism which of them other ranks have (core/tensor_parallel/layers.py)."""
    r = Rank(sizes, layout, settings)
    lines = [Saved("token ids", (r.tokens,), 8)]
    if layout.tp > 1:
        lines.append(Saved("ids of other ranks, in its product", (r.tokens,), 1))
    if settings.dropout:
        lines.append(Saved("dropout mask", (r.rows, sizes.hidden), r.e if r.cpu else 1))
    return lines


def head_saved(sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """Final norm, output head and vocabulary-parallel cross entropy, whose softmax is kept in fp32.

    Source: core/tensor_parallel/cross_entropy.py, ``VocabParallelCrossEntropy``.
    """
    r = Rank(sizes, layout, settings)
    return [
        *saved_tensors.norm(r, r.rows, sizes.hidden),
        Saved("normed, input of the head", (r.rows, sizes.hidden), r.e),
        *_loss(r),
    ]


def _loss(r: Rank) -> list[Saved]:
    return [
        Saved("softmax of the logits", (r.tokens, r.s.padded_vocab), FP32),
        Saved("targets, and which other ranks have", (r.tokens,), 8 + 1),
    ]


def mtp_saved(sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """One prediction head beside what :func:`mtp_inner_saved` says: its embedding, the head's input, its loss."""
    r = Rank(sizes, layout, settings)
    normed = Saved("normed, input of the head", (r.rows, sizes.hidden), r.e)
    return [*embedding_saved(sizes, layout, settings), normed, *_loss(r)]


def mtp_inner_saved(pattern: Pattern, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """Three norms, the projection that joins state and token, and the layers of a prediction head.

    Source: core/transformer/multi_token_prediction.py.
    """
    r = Rank(sizes, layout, settings)
    return [
        *saved_tensors.norm(r, r.rows, sizes.hidden) * 3,
        Saved("state and token, input of their projection", (r.rows, 2 * sizes.hidden), r.e),
        *[line for symbol in pattern.mtp for line in saved_tensors.layer(symbol, r)],
    ]


def total(lines: Sequence[Saved]) -> int:
    """Bytes of a table."""
    return round(sum(line.bytes for line in lines))


def activation_table(pattern: Pattern, sizes: Sizes, layout: Layout, settings: Activations) -> dict[str, int]:
    """Bytes of one micro-batch on one rank by part: ``embedding``, each symbol (one layer), ``head``, and ``mtp``.

    Without full recomputation; ``mtp`` is one prediction head with its layers.
    """
    result = {"embedding": total(embedding_saved(sizes, layout, settings))}
    for symbol in dict.fromkeys(pattern.layers + pattern.mtp):
        result[symbol] = layer_activation_bytes(symbol, sizes, layout, settings)
    result["head"] = total(head_saved(sizes, layout, settings))
    if pattern.mtp_depths:
        inner = mtp_inner_saved(pattern, sizes, layout, settings)
        result["mtp"] = total([*mtp_saved(sizes, layout, settings), *inner])
    return result


# A stage -----------------------------------------------------------------------------------------


def segment_activation_bytes(
    layers: str,
    sizes: Sizes,
    layout: Layout,
    settings: Activations,
    extra: int = 0,
) -> tuple[int, int]:
    """One micro-batch in one segment.

    Args:
        extra: Bytes of what the segment holds beside its layers.

    Returns:
        Bytes kept; and the most that comes alive again, beside these, while something is recomputed.
    """
    each = [layer_activation_bytes(symbol, sizes, layout, settings) for symbol in layers]
    plain = replace(settings, modules=frozenset())
    again = [layer_activation_bytes(c, sizes, layout, plain) - kept for c, kept in zip(layers, each, strict=True)]
    groups = _recomputed_groups(len(layers), settings.recompute)
    if not groups:
        return sum(each) + extra, max(again, default=0)
    r = Rank(sizes, layout, settings)
    split = layout.tp if settings.recompute.distribute and not layout.sequence_parallel else 1
    group_input = r.rows * sizes.hidden * r.e // split
    kept = len(groups) * group_input + sum(each[groups[-1].stop :]) + extra
    # a group's own selective recomputation comes alive within it
    alive = [sum(each[i] for i in group) + max(again[i] for i in group) for group in groups]
    return kept, max(alive + again[groups[-1].stop :])


def _recomputed_groups(layers: int, recompute: Recompute) -> list[range]:
    """Layers of a segment that are recomputed together; all of them first (core/recompute.py)."""
    if recompute.method == "uniform":
        step = recompute.layers
        return [range(i, min(i + step, layers)) for i in range(0, layers, step)]
    if recompute.method == "block":
        return [range(i, i + 1) for i in range(min(recompute.layers, layers))]
    return []


def stage_activation_bytes(pattern: Pattern, sizes: Sizes, layout: Layout, settings: Activations, stage: int) -> int:
    """The most bytes of activations that a rank of a pipeline stage holds in a step.

    Micro-batches in flight are those of the schedule (:func:`megatron_hybrid.costs.schedule.in_flight`); what is
    recomputed is alive for one of them.

    Raises:
        ValueError: The pattern does not divide over the stages, interleaving does not fit, or something is not
            counted.
    """
    what = stages(pattern, layout.pp)[stage]
    parts = [
        segment_activation_bytes(layers, sizes, layout, settings, beside_layers(pattern, what, i, sizes, layout, settings))
        for i, layers in enumerate(what.segments)
    ]
    kept = [part[0] for part in parts]
    again = max(part[1] for part in parts)
    if what.last and pattern.mtp_depths and settings.recompute.method == "uniform":
        again = max(again, total(mtp_inner_saved(pattern, sizes, layout, settings)))
    held = in_flight(layout.pp, stage, layout.micro_batches, len(kept), kept)
    return sum(n * size for n, size in zip(held, kept, strict=True)) + again


def beside_layers(
    pattern: Pattern, stage: Stage, segment: int, sizes: Sizes, layout: Layout, settings: Activations
) -> int:
    """Embedding, output head and prediction heads of a segment."""
    result = 0
    if stage.first and segment == 0:
        result += total(embedding_saved(sizes, layout, settings))
    if stage.last and segment == len(stage.segments) - 1:
        result += total(head_saved(sizes, layout, settings))
        result += pattern.mtp_depths * total(mtp_saved(sizes, layout, settings))
        if settings.recompute.method == "uniform":  # upstream skips block here
            r = Rank(sizes, layout, settings)
            result += pattern.mtp_depths * 2 * r.rows * sizes.hidden * r.e  # state and embedded token
        else:
            result += pattern.mtp_depths * total(mtp_inner_saved(pattern, sizes, layout, settings))
    return result
