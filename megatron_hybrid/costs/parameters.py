"""Parameters of layers and models: exactly those of the model that is built from the same arguments."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.layers.intra.design import CONV_WIDTH, IntraDesign
from megatron_hybrid.pattern import LAYERS, Pattern

SSD_CHUNK = 128
"""Tokens of a chunk of the Mamba-2 scan, for which it keeps one state (core/ssm/mamba_mixer.py:192, ``chunk_size``)."""
DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule (core/ssm/gated_delta_net/common.py:807, ``chunk_size``)."""


class Parameters(NamedTuple):
    """Parameters of one layer; ``active`` leaves out experts that a token is not routed to."""

    total: int
    active: int


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of a model."""

    total: int
    """All."""
    active: int
    """All that a token meets: without the experts that it is not routed to."""
    embedding: int
    """Token embedding, and the output head unless it is tied to it."""

    @property
    def non_embedding(self) -> int:
        """The paper's N."""
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        """The paper's N for a mixture of experts."""
        return self.active - self.embedding


# The linear layers -------------------------------------------------------------------------------
# One table per layer serves both counts: a linear layer [n_in, n_out] has n_in * n_out weights and
# costs 2 * n_in * n_out FLOPs per token forward.

Linear = tuple[int, int]


def _attention_linears(s: Sizes) -> list[Linear]:
    q, kv = s.heads * s.head_dim, int(s.query_groups * s.head_dim)
    return [(s.hidden, q * (1 + s.output_gate) + 2 * kv), (q, s.hidden)]


def _mamba_linears(s: Sizes) -> list[Linear]:
    inner = s.mamba_heads * s.mamba_head_dim
    return [(s.hidden, _ssm_input(s, inner)), (inner, s.hidden)]


def _ssm_input(s: Sizes, inner: int) -> int:
    """Width of z, x, B, C and dt."""
    return 2 * inner + 2 * s.mamba_groups * s.state_dim + inner // s.mamba_head_dim


def _intra_linears(s: Sizes) -> list[Linear]:
    d = intra(s)
    return [(s.hidden, sum(part.rows for part in d.in_parts)), (sum(d.out_parts.values()), s.hidden)]


def intra(s: Sizes) -> IntraDesign:
    if s.intra is None:
        raise ValueError("P layers need the sizes of their branches")
    return s.intra


def _delta_linears(s: Sizes) -> list[Linear]:
    qk, value = s.delta_key_heads * s.delta_key_dim, s.delta_value_heads * s.delta_value_dim
    return [(s.hidden, 2 * qk + 2 * value + 2 * s.delta_value_heads), (value, s.hidden)]


def _ffn_linears(s: Sizes, width: int) -> list[Linear]:
    return [(s.hidden, width * (1 + s.gated)), (width, s.hidden)]


def _moe_linears(s: Sizes, experts: int) -> list[Linear]:
    """The router, ``experts`` routed experts and the shared expert with its gate."""
    if not s.experts:
        raise ValueError("E layers need --num-experts")
    linears = [(s.hidden, s.experts), *_ffn_linears(s, s.expert_ffn) * experts]
    if s.shared_ffn:
        linears += _ffn_linears(s, s.shared_ffn)
        if s.shared_gate:
            linears.append((s.hidden, 1))
    return linears


def layer_linears(symbol: str, s: Sizes) -> list[Linear]:
    """The linear layers that a token meets in a layer."""
    if symbol in "*W":
        return _attention_linears(s)
    if symbol == "M":
        return _mamba_linears(s)
    if symbol == "P":
        return _intra_linears(s)
    if symbol == "G":
        return _delta_linears(s)
    if symbol == "-":
        return _ffn_linears(s, s.ffn)
    if symbol == "E":
        return _moe_linears(s, s.topk)
    raise ValueError(f"{symbol!r} is not a layer; the layers are {' '.join(LAYERS)}")


def weights(linears: list[Linear]) -> int:
    return sum(n_in * n_out for n_in, n_out in linears)


# Parameters --------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """One parameter of the model."""

    size: int
    """Elements."""
    expert: bool = False
    """Of a routed expert."""
    own_bucket: bool = False
    """A copy of the embedding that pipeline stages keep equal: gradient buffers give it a bucket of its own."""


def layer_tensors(symbol: str, sizes: Sizes, tp: int = 1, ep: int = 1, etp: int | None = None) -> list[Tensor]:
    """The parameters of one layer on one rank, its input norm included, in the order of the model.

    That is the order of registration of backend ``torch``; in ``te`` the norms come inside of the linear layers and all
    first products of experts before all second ones. The expert bias of the router is a buffer: no parameter.

    Args:
        sizes: Of the whole layer.
        tp: Tensor-parallel ranks; ep: expert-parallel ranks; etp: of each expert, default tp.

    Raises:
        ValueError: for an unknown symbol or sizes that do not divide.
    """
    layer_linears(symbol, sizes)
    s = sizes.shard(tp, ep, etp)
    if symbol == "E":
        return _dense(norm_sizes(s)) + _moe_tensors(s)
    if symbol == "M":  # upstream registers the norm behind the mixer
        return _dense(_mamba_tensors(sizes, s, tp) + norm_sizes(s))
    if symbol == "P":
        return _dense(norm_sizes(s) + _intra_tensors(sizes, s, tp))
    tensors = {"*": _attention_tensors, "W": _attention_tensors, "G": _delta_tensors, "-": _ffn_tensors}
    return _dense(norm_sizes(s) + tensors[symbol](s))


def layer_parameters(symbol: str, sizes: Sizes) -> Parameters:
    """Parameters of one layer, its input norm included. The expert bias is a buffer: not counted.

    Raises:
        ValueError: for an unknown symbol or sizes that do not divide.
    """
    tensors = layer_tensors(symbol, sizes)
    total = sum(t.size for t in tensors)
    if symbol != "E":
        return Parameters(total, total)
    held = sizes.experts // sizes.expert_ranks
    one = sum(t.size for t in tensors if t.expert) // held
    return Parameters(total, total - (held - sizes.topk) * one)  # a rank may have fewer than a token meets


def _dense(sizes: list[int]) -> list[Tensor]:
    return [Tensor(size) for size in sizes]


def norm_sizes(s: Sizes, width: int | None = None) -> list[int]:
    """Weight, and bias of a LayerNorm, over the hidden size or another width."""
    return [s.hidden if width is None else width] * (1 + s.layer_norm)


def _linear(linear: Linear, bias: bool) -> list[int]:
    n_in, n_out = linear
    return [n_in * n_out, n_out] if bias else [n_in * n_out]


def _attention_tensors(s: Sizes) -> list[int]:
    qkv, out = _attention_linears(s)
    qk_norms = norm_sizes(s, s.head_dim) * 2 if s.qk_norm else []
    return _linear(out, s.bias) + _linear(qkv, s.bias or s.qkv_bias) + qk_norms


def _ffn_tensors(s: Sizes, width: int | None = None) -> list[int]:
    first, second = _ffn_linears(s, s.ffn if width is None else width)
    return _linear(first, s.bias) + _linear(second, s.bias)


def _moe_tensors(s: Sizes) -> list[Tensor]:
    """Router, routed experts one by one, shared expert; its gate has no bias, and itself allows none."""
    router = _dense(_linear((s.hidden, s.experts), s.bias))
    experts = [Tensor(size, expert=True) for size in _ffn_tensors(s, s.expert_ffn)] * (s.experts // s.expert_ranks)
    gate = [s.hidden] if s.shared_gate and s.shared_ffn else []
    return router + experts + _dense(gate + (_ffn_tensors(s, s.shared_ffn) if s.shared_ffn else []))


def _ssm_tensors(channels: int, heads: int, shared: int) -> list[int]:
    """Convolution (weight and bias), dt_bias, A_log and D, and the channels that ranks have in common."""
    common = [shared * CONV_WIDTH, shared] if shared else []
    return [channels * CONV_WIDTH, channels, heads, heads, heads, *common]


def shared_states(groups: int, state_dim: int, tp: int) -> int:
    """Rows of B and C that are whole on every rank (layers/mamba/module.py): all of fewer groups than ranks."""
    return 2 * groups * state_dim if groups < tp else 0


def _mamba_tensors(whole: Sizes, s: Sizes, tp: int) -> list[int]:
    inner = s.mamba_heads * s.mamba_head_dim
    shared = shared_states(whole.mamba_groups, s.state_dim, tp)
    own_states = 0 if shared else 2 * s.mamba_groups * s.state_dim
    project = [s.hidden * (2 * inner + own_states + s.mamba_heads), *([s.hidden * shared] if shared else [])]
    return [*_ssm_tensors(inner + own_states, s.mamba_heads, shared), *project, inner, inner * s.hidden]


def _intra_tensors(whole: Sizes, s: Sizes, tp: int) -> list[int]:
    """Branches, fusion, input projection with the rows that ranks share (layers/parts.py), output."""
    design, d = intra(whole), intra(s)
    shared = shared_states(design.ssm_groups, d.state_dim, tp)
    own_states = 0 if shared else 2 * d.ssm_groups * d.state_dim
    branches = _ssm_tensors(d.ssm_dim + own_states, d.ssm_heads, shared) * d.branches.count("mamba")
    split = sum(part.local_rows(tp) for part in design.in_parts if not part.is_shared(tp))
    common = sum(part.rows for part in design.in_parts if part.is_shared(tp))
    project = [s.hidden * split, *([s.hidden * common] if common else [])]
    return [*branches, *_fusion_tensors(d), *project, sum(d.out_parts.values()) * s.hidden]


def _fusion_tensors(d: IntraDesign) -> list[int]:
    widths = [d.width(0), d.width(1)]
    norms = {"none": [], "group": widths, "fused": list(d.out_parts.values())}[d.norm]
    if d.scale == "scalar":
        return [2, *norms]
    if d.scale == "diff-lambda":
        return [4 * d.lambda_dim, *norms]
    return [*norms, *widths] if d.scale == "vector" else norms


def _delta_tensors(s: Sizes) -> list[int]:
    """dt_bias, A_log, the input projection, a convolution without bias, the output norm over one head, the output."""
    project, out = _delta_linears(s)
    heads = s.delta_value_heads
    return [
        heads,
        heads,
        *_linear(project, False),
        delta_conv(s),
        *norm_sizes(s, s.delta_value_dim),
        *_linear(out, False),
    ]


def norm(s: Sizes, width: int | None = None) -> int:
    return sum(norm_sizes(s, width))


def delta_conv(s: Sizes) -> int:
    channels = 2 * s.delta_key_heads * s.delta_key_dim + s.delta_value_heads * s.delta_value_dim
    return channels * s.delta_conv_width


def mtp_weights(pattern: Pattern, sizes: Sizes) -> int:
    """Sets of weights of the prediction heads."""
    return min(1, pattern.mtp_depths) if sizes.mtp_repeated else pattern.mtp_depths


def model_parameters(pattern: Pattern, sizes: Sizes) -> ModelParameters:
    """Parameters of a whole model: embedding, layers, final norm, and MTP heads."""
    s = sizes
    embedding = s.padded_vocab * s.hidden * (1 if s.tied else 2)
    layers = [layer_parameters(symbol, s) for symbol in pattern.layers]
    other = norm(s)
    for _ in range(mtp_weights(pattern, s)):
        layers += [layer_parameters(symbol, s) for symbol in pattern.mtp]
        other += 3 * norm(s) + 2 * s.hidden * s.hidden  # its three norms; [state; token] -> state
    return ModelParameters(
        total=embedding + other + sum(p.total for p in layers),
        active=embedding + other + sum(p.active for p in layers),
        embedding=embedding,
    )
