"""What one rank sends for a layer and a micro-batch, by group of ranks.

Counted are bytes *sent* by ring algorithms among n ranks, the least that a collective can do without help from the
network: all-gather and reduce-scatter send (n - 1) / n of the whole tensor, an all-reduce twice that, an all-to-all
(n - 1) / n of the rank's own buffer, point-to-point the tensor. A group of one rank sends nothing.

A layer is a list of :class:`Exchange`, one for each place that communicates, its forward and backward pass apart, since
recomputation repeats the forward pass.

Experts are taken to receive equal numbers of tokens; what a rank sends differs, the mean of the ranks does not.
Attention is our core, which gathers K and V; Transformer Engine's ring (``*`` on ``te``) sends as much forward. Inputs
that ``--distribute-saved-activations`` gathers again are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from megatron_hybrid.accounting.activation_settings import Recompute
from megatron_hybrid.accounting.eight_bit import SCALES, eight_bit_recipe
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.loss_chunks import fuses_loss
from megatron_hybrid.accounting.refusals import refuse, refuse_dispatchers
from megatron_hybrid.accounting.sizes import Sizes, setting
from megatron_hybrid.accounting.storage import Storage

Group = Literal["tensor", "context", "expert", "expert tensor", "pipeline", "data", "expert data", "embedding"]
"""Ranks of tensor, context and expert parallelism, of tensor parallelism inside experts; neighbours in the pipeline;
replicas of parameters, context-parallel ranks among them, and of experts; first and last stage, which share the
embedding."""
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class Traffic:
    """What a rank sends."""

    calls: int = 0
    bytes: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.calls + other.calls, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.calls * times, self.bytes * times)


NOTHING = Traffic()

NOT_COUNTED = {"moe_shared_expert_overlap": "shared experts in between the dispatcher's calls"}
"""Settings of Megatron whose communication this package does not know, and why."""


@dataclass(frozen=True, kw_only=True)
class CommunicationSettings:
    """What decides on bytes and repetitions beside sizes and layout."""

    activation: int = 2
    """Bytes of an element."""
    operand: float | None = None
    """Bytes of an element that Transformer Engine's linears gather in 8 bits; None: as ``activation``."""
    probability: int = 2
    """Bytes of an expert's probability."""
    storage: Storage = Storage()
    """Bytes of parameters and gradients, and who shares the optimizer's state."""
    overlaps_gather: bool = False
    """Parameters are gathered during the next forward pass."""
    fused_cross_entropy: bool = False
    """Sums of the loss go in one call."""
    fused_loss: bool = False
    """Output head and loss are one function."""
    recompute: Recompute = Recompute()

    @classmethod
    def from_args(cls, args: Any) -> "CommunicationSettings":
        """The settings of Megatron's arguments; absent ones have Megatron's default.

        Raises:
            ValueError: A setting that is not counted.
        """
        get = partial(setting, args)
        refuse(args, NOT_COUNTED, "communication")
        refuse_dispatchers(args)
        storage, recipe = Storage.from_args(args), eight_bit_recipe(args)
        if storage.optimizer_instances > 1:
            raise ValueError(
                f"--num-distributed-optimizer-instances {storage.optimizer_instances}: gradients that instances sum "
                "among them are not counted. Drop it from the plan."
            )
        return cls(
            activation=storage.parameter,
            operand=None if recipe is None else 1 + SCALES[recipe],
            probability={"fp32": 4, "fp64": 8}.get(get("moe_router_dtype", ""), storage.parameter),
            storage=storage,
            overlaps_gather=bool(get("overlap_param_gather")),
            fused_cross_entropy=bool(get("cross_entropy_loss_fusion")),
            fused_loss=fuses_loss(args),
            recompute=Recompute.from_args(args),
        )


@dataclass(frozen=True)
class Exchange:
    """One place of a layer that communicates, for one micro-batch."""

    group: Group
    forward: Traffic
    backward: Traffic
    inside: tuple[str, ...] = ()
    """The recomputations, beside ``full``, that run its forward pass again."""


def scatter(ranks: int, size: float) -> Traffic:
    """All-gather or reduce-scatter of ``size`` bytes in all, or all-to-all of ``size`` bytes on the rank."""
    return Traffic(1, size * (ranks - 1) / ranks) if ranks > 1 else NOTHING


def all_reduce(ranks: int, size: float) -> Traffic:
    """Of ``size`` bytes: a reduce-scatter and an all-gather."""
    return Traffic(1, 2 * size * (ranks - 1) / ranks) if ranks > 1 else NOTHING


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on a rank."""

    sizes: Sizes
    """Of whole layers."""
    layout: Layout
    settings: CommunicationSettings

    @property
    def local(self) -> Sizes:
        return self.layout.shard(self.sizes)

    @property
    def tokens(self) -> int:
        return self.layout.tokens(self.sizes.seq_length)

    def size(self, width: float, operand: bool = False) -> float:
        """Bytes of activations of that width, of all tokens that tensor-parallel ranks have in common.

        operand: As factors of a product of Transformer Engine's, which under ``--fp8-format`` are gathered in 8 bits.
        """
        each = self.settings.operand if operand and self.settings.operand else self.settings.activation
        return self.tokens * width * each


def column(m: MicroBatch, width: int, inside: tuple[str, ...] = (), eight_bit: bool = False) -> Exchange:
    """Into a column-parallel linear of that input (core/tensor_parallel/layers.py, 563 to 655).

    With sequence parallelism the input is gathered, and again for the weight's gradient, and its gradient is scattered;
    without, the gradient of the input is summed.

    Args:
        eight_bit: Its products are in 8 bits under ``--fp8-format``.
    """
    tp, size = m.layout.tp, m.size(width)
    if m.layout.sequence_parallel:
        gathered = scatter(tp, m.size(width, operand=eight_bit))
        return Exchange("tensor", gathered, gathered + scatter(tp, size), inside)
    return Exchange("tensor", NOTHING, all_reduce(tp, size), inside)


def row(m: MicroBatch, inside: tuple[str, ...] = (), eight_bit: bool = False) -> Exchange:
    """Out of a row-parallel linear or the embedding: a sum that is scattered with sequence parallelism.

    Args:
        eight_bit: As of ``column``; the gradient of the output is then gathered in 8 bits.
    """
    tp, size = m.layout.tp, m.size(m.sizes.hidden)
    if m.layout.sequence_parallel:
        gathered = scatter(tp, m.size(m.sizes.hidden, operand=eight_bit))
        return Exchange("tensor", scatter(tp, size), gathered, inside)
    return Exchange("tensor", all_reduce(tp, size), NOTHING, inside)


def projections(m: MicroBatch, *inside: str, shares_rows: bool = False) -> list[Exchange]:
    """Into and out of a layer whose first linear is column-parallel and whose last one is row-parallel.

    Args:
        shares_rows: The first one has rows that ranks share: it is torch's whatever the precision (layers/parts.py).
    """
    return [column(m, m.sizes.hidden, inside, eight_bit=not shares_rows), row(m, inside, eight_bit=True)]


def by_heads(m: MicroBatch, widths: list[float], *inside: str) -> Exchange:
    """All-to-alls from a share of the sequence to a share of the heads, or back, one for each width."""
    one_way = sum((scatter(m.layout.cp, m.size(width)) for width in widths), NOTHING)
    return Exchange("context", one_way, one_way, inside)


def spanning_norm(m: MicroBatch, groups: int, *inside: str) -> Exchange:
    """Sums of squares of norm groups that span ranks, in fp32 (layers/norm.py, ``group_rms_normalise``)."""
    sums = all_reduce(m.layout.tp, m.tokens * groups * 4)
    return Exchange("tensor", sums, sums, inside)


def run(exchange: Exchange, settings: CommunicationSettings, layer_again: int = 0) -> Traffic:
    """An exchange forward and backward; its forward pass runs once more for each recomputation that it is inside.

    Args:
        layer_again: Recomputations of the whole layer, or of what the exchange is part of.
    """
    again = sum(name in settings.recompute.modules for name in exchange.inside) + layer_again
    return exchange.forward * (1 + again) + exchange.backward


def add_up(sent: Iterable[tuple[Group, Traffic]]) -> dict[Group, Traffic]:
    """The sum of each group, in the order of ``GROUPS``."""
    total = dict.fromkeys(GROUPS, NOTHING)
    for group, traffic in sent:
        total[group] += traffic
    return total
