"""Bytes that forward passes keep for backward passes on one rank: of a layer, a micro-batch, and a stage at its peak.

Counted is what autograd keeps, storage by storage (:mod:`megatron_hybrid.accounting.saved` says
which tables are measured), and at a stage's peak what the loss makes besides. Not counted is what else lives within one
operation: gradients of activations, buffers of collectives, the allocator's fragments.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from megatron_hybrid.accounting.activation_settings import ActivationSettings, Recompute
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.loss_chunks import chunk_tokens
from megatron_hybrid.accounting.saved import FP32, Rank, Saved, norm
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.costs.schedule import in_flight
from megatron_hybrid.costs.stages import Stage, stages
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern

# One micro-batch ---------------------------------------------------------------------------------


def layer_saved(symbol: str, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """The table of one layer, with selective recomputation; full recomputation is of a stage.

    Args:
        sizes: Of the whole model.
    """
    return _layer(symbol, Rank(sizes, layout, settings))


def _layer(symbol: str, r: Rank) -> list[Saved]:
    """The table of a layer, its input norm and its residual included."""
    costs, h = account(symbol), r.whole.hidden
    each = r.operand if r.settings.eight_bit and costs.reads_in_8_bits(r.whole, r.layout.tp) else r.e
    lines = norm(r, r.rows, h) + [Saved("norm: output, input of the projection", (r.rows, h), each)]
    lines += costs.saved(r)
    if not r.keeps("mlp") and costs.empty_mlp and r.norm_bytes != r.e:
        # upstream recomputes the empty FFN of these layers too; in fp32 and on CUDA its input is the next norm's
        lines.append(Saved("output", (r.rows, h), r.e))
    if r.settings.dropout:
        lines.append(Saved("dropout mask", (r.rows, h), r.e if r.cpu else 1))
    return lines


@lru_cache(maxsize=4096)
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

    Fused, both keep their gradients instead, which the forward pass computes: that of the weight as it is summed up.

    Source: core/tensor_parallel/cross_entropy.py, ``VocabParallelCrossEntropy``; kernels/linear_cross_entropy.py.
    """
    r = Rank(sizes, layout, settings)
    if settings.fused_loss:
        return [
            *norm(r, r.rows, sizes.hidden),
            Saved("gradient of the head's input", (r.tokens, sizes.hidden), r.e),
            Saved("gradient of the head's weight", (r.s.padded_vocab, sizes.hidden), FP32),
            Saved("mask of the losses", (r.tokens,), FP32),
        ]
    return [
        *norm(r, r.rows, sizes.hidden),
        Saved("normed, input of the head", (r.rows, sizes.hidden), r.e),
        *_loss(r),
    ]


def _loss(r: Rank) -> list[Saved]:
    return [
        Saved("softmax of the logits", (r.tokens, r.s.padded_vocab), FP32),
        Saved("targets, and which other ranks have", (r.tokens,), 8 + 1),
    ]


def loss_temporary_bytes(sizes: Sizes, layout: Layout, settings: ActivationSettings) -> int:
    """What the loss makes while all else is kept: the largest of all temporaries.

    Fused with the output head: the logits of a chunk of tokens, or the weight's gradient in the weight's precision.
    Otherwise the logits' gradient, turned from fp32, which the softmax's own memory takes, to 16 bits. On an H100 that
    was 1.96 of the 2.03 GiB that the peak of ``paper-1b-intra`` had beyond what is kept (docs/benchmarks/h100).
    """
    r = Rank(sizes, layout, settings)
    if settings.fused_loss:
        return max(chunk_tokens(r.tokens, r.s.padded_vocab, r.e), sizes.hidden) * r.s.padded_vocab * r.e
    return 0 if r.e == FP32 else r.tokens * r.s.padded_vocab * r.e


def mtp_saved(sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """One prediction head beside what :func:`mtp_inner_saved` says: its embedding, the head's input, its loss.

    The fused loss of a prediction head computes its gradients in the backward pass, from the input of all rows.
    """
    r = Rank(sizes, layout, settings)
    if settings.fused_loss:
        return [
            *embedding_saved(sizes, layout, settings),
            Saved("input of the head", (r.tokens, sizes.hidden), r.e),
            Saved("targets, logarithms of the sums of exponentials", (r.tokens,), 8 + FP32),
        ]
    normed = Saved("normed, input of the head", (r.rows, sizes.hidden), r.e)
    return [*embedding_saved(sizes, layout, settings), normed, *_loss(r)]


def mtp_inner_saved(pattern: Pattern, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> list[Saved]:
    """Three norms, the projection that joins state and token, and the layers of a prediction head.

    Source: core/transformer/multi_token_prediction.py.
    """
    r = Rank(sizes, layout, settings)
    return [
        *norm(r, r.rows, sizes.hidden) * 3,
        Saved("state and token, input of their projection", (r.rows, 2 * sizes.hidden), r.operand),
        *[line for symbol in pattern.mtp for line in _layer(symbol, r)],
    ]


def total(lines: Sequence[Saved]) -> int:
    """Bytes of a table."""
    return round(sum(line.bytes for line in lines))


def activation_table(pattern: Pattern, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> dict[str, int]:
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
    settings: ActivationSettings,
    extra: int = 0,
) -> tuple[int, int]:
    """One micro-batch in one segment.

    Args:
        extra: Bytes of what the segment holds beside its layers.

    Returns:
        Bytes kept; and the most that comes alive again, beside these, while something is recomputed.
    """
    each = [layer_activation_bytes(symbol, sizes, layout, settings) for symbol in layers]
    again = [_recomputed_bytes(symbol, sizes, layout, settings) for symbol in layers]
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


@lru_cache(maxsize=4096)
def _recomputed_bytes(symbol: str, sizes: Sizes, layout: Layout, settings: ActivationSettings) -> int:
    """What a layer's selective recomputation brings back: the lines that it is without."""
    plain = replace(settings, recompute=Recompute())
    lines = Counter(layer_saved(symbol, sizes, layout, plain)) - Counter(layer_saved(symbol, sizes, layout, settings))
    return total(list(lines.elements()))


def _recomputed_groups(layers: int, recompute: Recompute) -> list[range]:
    """Layers of a segment that are recomputed together; all of them first (core/recompute.py)."""
    if recompute.method == "uniform":
        step = recompute.layers
        return [range(i, min(i + step, layers)) for i in range(0, layers, step)]
    if recompute.method == "block":
        return [range(i, i + 1) for i in range(min(recompute.layers, layers))]
    return []


def stage_activation_bytes(
    pattern: Pattern, sizes: Sizes, layout: Layout, settings: ActivationSettings, stage: int
) -> int:
    """The most bytes of activations that a rank of a pipeline stage holds in a step.

    Micro-batches in flight are those of the schedule (:func:`megatron_hybrid.costs.schedule.in_flight`); what is
    recomputed, or a temporary of the loss if that is more, is alive for one of them.

    Raises:
        ValueError: The pattern does not divide over the stages, interleaving does not fit, or something is not
            counted.
    """
    what = stages(pattern, layout.pp)[stage]
    parts = [
        segment_activation_bytes(
            layers, sizes, layout, settings, beside_layers(pattern, what, i, sizes, layout, settings)
        )
        for i, layers in enumerate(what.segments)
    ]
    kept = [part[0] for part in parts]
    again = max(part[1] for part in parts)
    if what.last and pattern.mtp_depths and settings.recompute.method == "uniform":
        again = max(again, total(mtp_inner_saved(pattern, sizes, layout, settings)))
    if what.last:
        again = max(again, loss_temporary_bytes(sizes, layout, settings))
    held = in_flight(layout.pp, stage, layout.micro_batches, len(kept), kept)
    return sum(n * size for n, size in zip(held, kept, strict=True)) + again


def beside_layers(
    pattern: Pattern, stage: Stage, segment: int, sizes: Sizes, layout: Layout, settings: ActivationSettings
) -> int:
    """Embedding, output head and prediction heads of a segment."""
    result = 0
    if stage.first and segment == 0:
        result += total(embedding_saved(sizes, layout, settings))
    if stage.last and segment == len(stage.segments) - 1:
        result += total(head_saved(sizes, layout, settings))
        result += pattern.mtp_depths * total(mtp_saved(sizes, layout, settings))
        if pattern.mtp_depths and settings.fused_loss and not layout.sequence_parallel:
            r = Rank(sizes, layout, settings)
            result += r.rows * sizes.hidden * r.e  # the stack's output, one storage with those of the heads
        if settings.recompute.method == "uniform":  # upstream skips block here
            r = Rank(sizes, layout, settings)
            result += pattern.mtp_depths * 2 * r.rows * sizes.hidden * r.e  # state and embedded token
        else:
            result += pattern.mtp_depths * total(mtp_inner_saved(pattern, sizes, layout, settings))
    return result
