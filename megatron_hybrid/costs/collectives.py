"""What one rank sends for a layer and a micro-batch, by group of ranks.

Counted are bytes *sent* by ring algorithms among n ranks, the least that a collective can do without help from the
network: all-gather and reduce-scatter send (n - 1) / n of the whole tensor, an all-reduce twice that, an all-to-all
(n - 1) / n of the rank's own buffer, point-to-point the tensor. A group of one rank sends nothing.

A layer is a list of :class:`Part`, one for each place that communicates, its forward and backward pass apart, since
recomputation repeats the forward pass.

Experts are taken to receive equal numbers of tokens; what a rank sends differs, the mean of the ranks does not.
Attention is our core, which gathers K and V; Transformer Engine's ring (``*`` on ``te``) sends as much forward. Inputs
that ``--distribute-saved-activations`` gathers again are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from megatron_hybrid.costs.activation_settings import Recompute
from megatron_hybrid.costs.layout import Layout
from megatron_hybrid.costs.parameters import intra, layer_linears
from megatron_hybrid.costs.refusals import refuse, refuse_dispatchers
from megatron_hybrid.costs.sizes import Sizes, setting
from megatron_hybrid.costs.storage import Storage

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
    probability: int = 2
    """Bytes of an expert's probability."""
    storage: Storage = Storage()
    """Bytes of parameters and gradients, and who shares the optimizer's state."""
    overlaps_gather: bool = False
    """Parameters are gathered during the next forward pass."""
    fused_cross_entropy: bool = False
    """Sums of the loss go in one call."""
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
        storage = Storage.from_args(args)
        if storage.optimizer_instances > 1:
            raise ValueError(
                f"--num-distributed-optimizer-instances {storage.optimizer_instances}: gradients that instances sum "
                "among them are not counted. Drop it from the plan."
            )
        return cls(
            activation=storage.parameter,
            probability={"fp32": 4, "fp64": 8}.get(get("moe_router_dtype", ""), storage.parameter),
            storage=storage,
            overlaps_gather=bool(get("overlap_param_gather")),
            fused_cross_entropy=bool(get("cross_entropy_loss_fusion")),
            recompute=Recompute.from_args(args),
        )


@dataclass(frozen=True)
class Part:
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


# Layers ------------------------------------------------------------------------------------------


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

    def size(self, width: float) -> float:
        """Bytes of activations of that width, of all tokens that tensor-parallel ranks have in common."""
        return self.tokens * width * self.settings.activation


def column(m: MicroBatch, width: int, inside: tuple[str, ...] = ()) -> Part:
    """Into a column-parallel linear of that input (core/tensor_parallel/layers.py, 563 to 655).

    With sequence parallelism the input is gathered, and again for the weight's gradient, and its gradient is scattered;
    without, the gradient of the input is summed.
    """
    tp, size = m.layout.tp, m.size(width)
    if m.layout.sequence_parallel:
        return Part("tensor", scatter(tp, size), scatter(tp, size) * 2, inside)
    return Part("tensor", NOTHING, all_reduce(tp, size), inside)


def row(m: MicroBatch, inside: tuple[str, ...] = ()) -> Part:
    """Out of a row-parallel linear or the embedding: a sum that is scattered with sequence parallelism."""
    tp, size = m.layout.tp, m.size(m.sizes.hidden)
    if m.layout.sequence_parallel:
        return Part("tensor", scatter(tp, size), scatter(tp, size), inside)
    return Part("tensor", all_reduce(tp, size), NOTHING, inside)


def _projections(m: MicroBatch, *inside: str) -> list[Part]:
    return [column(m, m.sizes.hidden, inside), row(m, inside)]


def _keys_and_values(m: MicroBatch, widths: tuple[float, float], *inside: str) -> Part:
    """K and V of the whole sequence on each context-parallel rank (``TorchCoreAttention``)."""
    cp = m.layout.cp
    key, value = (scatter(cp, cp * m.size(width)) for width in widths)
    return Part("context", key + value, key + value, (*inside, "core_attn"))


def _by_heads(m: MicroBatch, widths: list[float], *inside: str) -> Part:
    """All-to-alls from a share of the sequence to a share of the heads, or back, one for each width."""
    one_way = sum((scatter(m.layout.cp, m.size(width)) for width in widths), NOTHING)
    return Part("context", one_way, one_way, inside)


def _scan(m: MicroBatch, inner: int, head_dim: int, groups: int, state_dim: int, *inside: str) -> list[Part]:
    """z, x, B, C and dt to the scan, and its result back (core/ssm/mamba_context_parallel.py, ``pre_conv_ssm``).

    Of fewer groups than ranks, each rank gets a copy of its own. The way there is in front of what ``ssm`` repeats.
    """
    states = max(groups, m.layout.cp) * state_dim
    there = _by_heads(m, [inner, inner, states, states, inner // head_dim], *inside)
    return [there, _by_heads(m, [inner], *inside, "ssm")]


def _spanning_norm(m: MicroBatch, groups: int, *inside: str) -> Part:
    """Sums of squares of norm groups that span ranks, in fp32 (layers/norm.py, ``group_rms_normalise``)."""
    sums = all_reduce(m.layout.tp, m.tokens * groups * 4)
    return Part("tensor", sums, sums, inside)


def _attention(m: MicroBatch) -> list[Part]:
    s, tp = m.sizes, m.layout.tp
    parts = _projections(m)
    if s.query_groups < tp:  # core/transformer/attention.py:1852
        ((_, projected), _) = layer_linears("*", s)
        whole = scatter(tp, m.size(projected))
        parts.append(Part("tensor", whole, whole))
    width = max(1, s.query_groups // tp) * s.head_dim
    return [*parts, _keys_and_values(m, (width, width))]


def _mamba(m: MicroBatch) -> list[Part]:
    s, local = m.sizes, m.local
    inner = local.mamba_heads * s.mamba_head_dim
    parts = _projections(m) + _scan(m, inner, s.mamba_head_dim, local.mamba_groups, s.state_dim)
    if s.mamba_groups < m.layout.tp:
        parts.append(_spanning_norm(m, s.mamba_groups, "ssm"))
    return parts


def _intra(m: MicroBatch) -> list[Part]:
    d, local, tp = intra(m.sizes), intra(m.local), m.layout.tp
    parts = _projections(m)
    for kind in d.branches:
        if kind == "attention":  # keys are repeated where each query head has values of its own
            heads = max(1, d.value_heads // tp)
            parts.append(_keys_and_values(m, (heads * d.qk_head_dim, heads * d.value_head_dim), "intra"))
        else:
            shape = (local.ssm_dim, d.ssm_head_dim, local.ssm_groups, d.state_dim)
            parts += _scan(m, *shape, "intra")
    inputs = {"none": 0, "group": 2, "fused": len(d.out_parts)}[d.norm]
    groups = [d.groups(i) for i in range(inputs)]
    if any(n % tp for n in groups):
        parts.append(_spanning_norm(m, sum(groups), "intra"))
    return parts


def _delta(m: MicroBatch) -> list[Part]:
    """The projected input to whole sequences of some heads, the result back (core/ssm/gated_delta_net)."""
    ((_, projected), (value, _)) = layer_linears("G", m.local)
    return [*_projections(m), _by_heads(m, [projected, value])]


def _experts(m: MicroBatch) -> list[Part]:
    """Tokens with their probabilities to the experts' ranks and back (core/transformer/moe/token_dispatcher.py:698).

    Each rank of an expert's tensor group needs the tokens of all of them (``:739``).
    """
    s, layout, ep, etp = m.sizes, m.layout, m.layout.ep, m.layout.etp
    rows = m.tokens * s.topk / (layout.tp if layout.sequence_parallel else 1)
    tokens, probabilities = rows * s.hidden * m.settings.activation, rows * m.settings.probability
    moved = scatter(ep, tokens) * 2 + scatter(ep, probabilities)
    gathered = scatter(etp, etp * tokens) * 2 + scatter(etp, etp * probabilities)
    parts = [Part("expert", moved, moved, ("moe",)), Part("expert tensor", gathered, gathered, ("moe",))]
    return parts + (_projections(m, "moe", "shared_experts") if s.shared_ffn else [])


def layer_parts(symbol: str, sizes: Sizes, layout: Layout, settings: CommunicationSettings) -> list[Part]:
    """Where a layer communicates.

    Raises:
        ValueError: An unknown symbol.
    """
    m = MicroBatch(sizes, layout, settings)
    kinds = {
        **dict.fromkeys("*W", _attention),
        "M": _mamba,
        "P": _intra,
        "G": _delta,
        "-": lambda m: _projections(m, "mlp"),
        "E": _experts,
    }
    if symbol not in kinds:
        raise ValueError(f"{symbol!r} is not a layer; the layers are {' '.join(kinds)}")
    return kinds[symbol](m)


def run(part: Part, settings: CommunicationSettings, layer_again: int = 0) -> Traffic:
    """A part forward and backward; the forward pass runs once more for each recomputation that it stands inside.

    Args:
        layer_again: Recomputations of the whole layer, or of what the part stands in.
    """
    again = sum(name in settings.recompute.modules for name in part.inside) + layer_again
    return part.forward * (1 + again) + part.backward


def add_up(sent: Iterable[tuple[Group, Traffic]]) -> dict[Group, Traffic]:
    """The sum of each group, in the order of ``GROUPS``."""
    total = dict.fromkeys(GROUPS, NOTHING)
    for group, traffic in sent:
        total[group] += traffic
    return total


def layer_communication(
    symbol: str, sizes: Sizes, layout: Layout, settings: CommunicationSettings
) -> dict[Group, Traffic]:
    """What a rank sends for one micro-batch through a layer, forward and backward; the layer itself is kept."""
    return add_up((part.group, run(part, settings)) for part in layer_parts(symbol, sizes, layout, settings))
