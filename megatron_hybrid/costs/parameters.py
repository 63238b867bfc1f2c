"""Parameters of layers and models: exactly those of the model that is built from the same arguments."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.intra_design import CONV_WIDTH, IntraDesign
from megatron_hybrid.pattern import LAYERS, Pattern


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
        """The study's N."""
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        """The study's N for a mixture of experts."""
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


def layer_parameters(symbol: str, sizes: Sizes) -> Parameters:
    """Parameters of one layer, its input norm included. The expert bias is a buffer: not counted.

    Raises:
        ValueError: for an unknown symbol or sizes that do not divide.
    """
    s = sizes
    linears = layer_linears(symbol, s)
    active = norm(s) + weights(linears) + _small_parameters(symbol, s)
    if symbol != "E":
        return Parameters(active, active)
    one = _ffn_linears(s, s.expert_ffn)
    idle = s.experts // s.expert_ranks - s.topk  # below 0 where a rank has fewer experts than a token meets
    return Parameters(active + idle * (weights(one) + s.bias * _outputs(one)), active)


def _small_parameters(symbol: str, s: Sizes) -> int:
    """All parameters of a layer but its input norm and weight matrices."""
    if symbol == "M":
        return _ssm_parameters(s, s.mamba_heads * s.mamba_head_dim)
    if symbol == "P":
        return intra(s).small_parameters()
    if symbol == "G":
        # dt_bias, A_log, the output norm over one head, and a convolution without bias.
        return 2 * s.delta_value_heads + norm(s, s.delta_value_dim) + delta_conv(s)
    if symbol in "*W":
        (_, qkv), (_, out) = _attention_linears(s)
        biases = qkv * (s.bias or s.qkv_bias) + out * s.bias
        return biases + 2 * s.qk_norm * norm(s, s.head_dim)
    # The shared expert's gate has no bias, and the shared expert itself allows none.
    return s.bias * _outputs(layer_linears(symbol, s)) - s.bias * (symbol == "E") * s.shared_gate


def _outputs(linears: list[Linear]) -> int:
    return sum(n_out for _, n_out in linears)


def norm(s: Sizes, width: int | None = None) -> int:
    return (1 + s.layer_norm) * (s.hidden if width is None else width)


def _ssm_parameters(s: Sizes, inner: int) -> int:
    """Convolution with bias over x, B and C; A_log, D and dt_bias per head; gated norm."""
    conv = inner + 2 * s.mamba_groups * s.state_dim
    return conv * (CONV_WIDTH + 1) + 3 * (inner // s.mamba_head_dim) + inner


def delta_conv(s: Sizes) -> int:
    channels = 2 * s.delta_key_heads * s.delta_key_dim + s.delta_value_heads * s.delta_value_dim
    return channels * s.delta_conv_width


def model_parameters(pattern: Pattern, sizes: Sizes) -> ModelParameters:
    """Parameters of a whole model: embedding, layers, final norm, and MTP heads."""
    s = sizes
    embedding = s.padded_vocab * s.hidden * (1 if s.tied else 2)
    layers = [layer_parameters(symbol, s) for symbol in pattern.layers]
    other = norm(s)
    for _ in range(1 if s.mtp_repeated and pattern.mtp_depths else pattern.mtp_depths):
        layers += [layer_parameters(symbol, s) for symbol in pattern.mtp]
        other += 3 * norm(s) + 2 * s.hidden * s.hidden  # its three norms; [state; token] -> state
    return ModelParameters(
        total=embedding + other + sum(p.total for p in layers),
        active=embedding + other + sum(p.active for p in layers),
        embedding=embedding,
    )
