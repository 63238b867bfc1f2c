"""What one rank sends in a training step, by group of ranks: all its micro-batches, and what a step does once.

The convention of counting is that of :mod:`megatron_hybrid.accounting.traffic`.

Left out, since they are a few numbers for each sample, token or step: batches that the first tensor-parallel rank
hands on, the numbers of tokens of experts and their balancing, losses, gradient norms, checks for NaN, and prediction
heads' shifted tokens at the borders of context-parallel ranks. With ``--overlap-grad-reduce`` the first stage sends the
same bytes in a call for each bucket.
"""

from collections.abc import Iterator
from math import ceil

from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.loss_chunks import chunk_tokens
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import norm
from megatron_hybrid.accounting.traffic import (
    NOTHING,
    CommunicationSettings,
    Exchange,
    Group,
    MicroBatch,
    Traffic,
    add_up,
    all_reduce,
    column,
    row,
    run,
    scatter,
)
from megatron_hybrid.costs.buffers import Buffer
from megatron_hybrid.costs.memory import stage_buffers, stage_tensors
from megatron_hybrid.costs.parameters import mtp_weights
from megatron_hybrid.costs.stages import Stage, stages
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern


def layer_communication(
    symbol: str, sizes: Sizes, layout: Layout, settings: CommunicationSettings
) -> dict[Group, Traffic]:
    """What a rank sends for one micro-batch through a layer, forward and backward; the layer itself is kept.

    Raises:
        ValueError: An unknown symbol.
    """
    exchanges = account(symbol).exchanges(MicroBatch(sizes, layout, settings))
    return add_up((exchange.group, run(exchange, settings)) for exchange in exchanges)


def step_communication(
    pattern: Pattern, sizes: Sizes, layout: Layout, settings: CommunicationSettings, stage: int = 0
) -> dict[Group, Traffic]:
    """What a rank of a pipeline stage sends in a training step, for each of ``GROUPS``.

    Raises:
        ValueError: The pattern does not divide over the stages.
    """
    m, held = MicroBatch(sizes, layout, settings), stages(pattern, layout.pp)[stage]
    sent = [(part.group, run(part, settings, again) * layout.micro_batches) for part, again in _parts(pattern, m, held)]
    sent.append(("pipeline", _messages(m, held) * layout.micro_batches))
    return add_up([*sent, *_once(pattern, m, stage)])


def _parts(pattern: Pattern, m: MicroBatch, stage: Stage) -> Iterator[tuple[Exchange, int]]:
    """The parts of a micro-batch on a stage, and how many recomputations of layers repeat each."""
    uniform = m.settings.recompute.method == "uniform"
    if stage.first:
        yield row(m), 0  # embedding
    for segment in stage.segments:
        yield from _stack(segment, m)
    if not stage.last:
        return
    for _ in range(pattern.mtp_depths):
        yield row(m), 0  # embedding
        # a head is recomputed as a whole, but by "block" (core/transformer/multi_token_prediction.py:1424), and its
        # layers are a stack of their own that recomputes as any stack does
        for part in _joins_state_and_token(m):
            yield part, uniform
        for part, again in _stack(pattern.mtp, m):
            yield part, again + uniform
    for _ in range(1 + pattern.mtp_depths):
        yield _output_head(m), 0
        yield _cross_entropy(m), 0


def _stack(layers: str, m: MicroBatch) -> Iterator[tuple[Exchange, int]]:
    recompute = m.settings.recompute
    parts = {symbol: account(symbol).exchanges(m) for symbol in set(layers)}
    for i, symbol in enumerate(layers):
        again = recompute.method == "uniform" or recompute.method == "block" and i < recompute.layers
        for part in parts[symbol]:
            yield part, again


def _joins_state_and_token(m: MicroBatch) -> list[Exchange]:
    """A column-parallel linear from 2 h to h (core/transformer/multi_token_prediction.py:1136).

    Its output is gathered; sequence parallelism takes its share of that, and gathers the share's gradient.
    """
    whole = scatter(m.layout.tp, m.size(m.sizes.hidden))
    return [
        column(m, 2 * m.sizes.hidden, eight_bit=True),
        Exchange("tensor", whole, whole if m.layout.sequence_parallel else NOTHING),
    ]


def _output_head(m: MicroBatch) -> Exchange:
    """A column-parallel linear; fused with the loss it is done with its input after the forward pass, or keeps it."""
    tp, size = m.layout.tp, m.size(m.sizes.hidden)
    if m.settings.fused_loss and m.layout.sequence_parallel:
        return Exchange("tensor", scatter(tp, size), scatter(tp, size))
    return column(m, m.sizes.hidden)


def _cross_entropy(m: MicroBatch) -> Exchange:
    """Maximum, the label's logit and the sum of exponentials, in fp32 (core/tensor_parallel/cross_entropy.py:130).

    Fused, the last two are one tensor (core/fusions/fused_cross_entropy.py:111). Fused with the output head, the first
    two are, and each chunk of tokens sends its own (kernels/linear_cross_entropy.py).
    """
    one = all_reduce(m.layout.tp, m.tokens * 4)
    if m.settings.fused_loss:
        chunks = ceil(m.tokens / chunk_tokens(m.tokens, m.local.padded_vocab, m.settings.activation))
        both = all_reduce(m.layout.tp, 2 * m.tokens * 4) + one
        return Exchange("tensor", Traffic(both.calls * chunks, both.bytes), NOTHING)
    sums = all_reduce(m.layout.tp, 2 * m.tokens * 4) if m.settings.fused_cross_entropy else one * 2
    return Exchange("tensor", one + sums, NOTHING)


def _messages(m: MicroBatch, stage: Stage) -> Traffic:
    """Each segment sends its output to the next and its input's gradient to the one before, where there is one."""
    size = m.size(m.sizes.hidden) / (m.layout.tp if m.layout.sequence_parallel else 1)
    messages = 2 * len(stage.segments) - stage.first - stage.last
    return Traffic(messages, messages * size) if m.layout.pp > 1 else NOTHING


def _once(pattern: Pattern, m: MicroBatch, stage: int) -> Iterator[tuple[Group, Traffic]]:
    """What the optimizer's step sends: gradients and parameters."""
    layout, settings, held = m.layout, m.settings, stages(pattern, m.layout.pp)[stage]
    storage = settings.storage
    dense, experts = stage_buffers(stage_tensors(pattern, m.sizes, layout, stage), layout, storage, stage)
    # each optimizer, and experts have one of their own, gathers the parameters of both
    # (core/optimizer/distrib_optimizer.py:3185), unless the next forward pass does it
    gathers = 2 if experts and not settings.overlaps_gather else 1
    replicas: list[tuple[Group, int, list[Buffer]]] = [
        ("data", layout.dp * layout.cp, dense),
        ("expert data", layout.expert_dp, experts),
    ]
    for group, ranks, buffers in replicas:
        for buffer in buffers:
            if storage.distributed:
                yield group, scatter(ranks, buffer.size * storage.gradient)
                yield group, scatter(ranks, buffer.size * storage.parameter) * gathers
            else:
                yield group, all_reduce(ranks, buffer.size * storage.gradient)
    shared = _shared_parameters(pattern, m, held)
    if shared:
        yield "tensor", all_reduce(layout.tp, shared * storage.gradient)
    if layout.pp > 1 and (m.sizes.tied or pattern.mtp_depths) and (held.first or held.last):
        # core/distributed/finalize_model_grads.py:195
        yield "embedding", all_reduce(2, m.local.padded_vocab * m.sizes.hidden * storage.gradient)


def _layers(pattern: Pattern, sizes: Sizes, stage: Stage) -> str:
    """Of a stage, those of the prediction heads among them."""
    return stage.layers + pattern.mtp * (mtp_weights(pattern, sizes) if stage.last else 0)


def _shared_parameters(pattern: Pattern, m: MicroBatch, stage: Stage) -> int:
    """Parameters that tensor-parallel ranks have in common while each sees a share of the gradient.

    Those are what layers with parts for fewer units than ranks have (``sum_shared_gradients`` in patches/building.py),
    and with sequence parallelism all that is not cut: norms, biases behind row-parallel linears, routers
    (core/distributed/finalize_model_grads.py:416).
    """
    s = m.sizes
    if m.layout.tp == 1:
        return 0
    layers = _layers(pattern, s, stage)
    total = sum(account(symbol).shared_by_ranks(s, m.layout.tp) for symbol in layers)
    if m.layout.sequence_parallel:
        total += sum(account(symbol).not_cut(s) for symbol in layers)
        total += norm(s) * (1 + 3 * mtp_weights(pattern, s)) * stage.last
    return total
