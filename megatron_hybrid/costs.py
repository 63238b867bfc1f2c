"""What a pattern costs: parameters and training FLOPs. The only place that counts.

Counts are of the whole model (all ranks together) and exact: they equal the sum of
``p.numel()`` over the parameters of the model built from the same arguments.

Two FLOPs conventions, both forward plus backward (three times the forward pass):

``model``
    every matrix product that is run, the output head and the depthwise convolutions included;
``study``
    six times the active non-embedding parameters, plus the attention and SSM cores, as in
    arXiv:2510.04800 (Table 1 and appendix C): no embedding, no output head.

This module imports neither torch nor Megatron.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_hybrid import intra_design
from megatron_hybrid.intra_design import CONV_WIDTH, IntraDesign
from megatron_hybrid.pattern import LAYERS, Pattern

Convention = Literal["model", "study"]


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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes that costs depend on. Widths are of the whole model, before any sharding."""

    hidden: int
    padded_vocab: int
    tied: bool = True
    seq_length: int
    layer_norm: bool = False
    """LayerNorm (weight and bias) in place of RMSNorm."""
    bias: bool = False
    """Biases in the linear layers of attention, FFN and router (Mamba, P and G never have any)."""
    qkv_bias: bool = False
    qk_norm: bool = False

    # Attention: * and W.
    heads: int
    query_groups: int
    head_dim: int
    output_gate: bool = False
    window: int = 512
    """W: tokens that a query sees, itself included, beside the sinks."""
    sinks: int = 64

    # Mamba-2: M, and the SSM branch of P.
    mamba_heads: int
    mamba_head_dim: int = 64
    mamba_groups: int = 8
    state_dim: int = 128

    intra: IntraDesign | None = None
    """Intra-layer hybrid: P. None: there are no such layers."""

    # FFN: - and E.
    ffn: int
    gated: bool = True
    """Gated activation (SwiGLU): two input projections."""
    experts: int = 0
    topk: int = 2
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Width of the shared expert; 0 for none."""
    shared_gate: bool = False

    # Gated delta net: G.
    delta_key_heads: int = 16
    delta_value_heads: int = 32
    delta_key_dim: int = 128
    """Per head, as is delta_value_dim."""
    delta_value_dim: int = 128
    delta_conv_width: int = 4

    mtp_repeated: bool = False
    """All MTP heads share one set of weights."""

    @classmethod
    def from_args(cls, args: Any) -> "Sizes":
        """Sizes from Megatron's arguments and ours, with the defaults that the model takes.

        ``args`` is anything with the attributes; what is absent has Megatron's default. Before a
        tokenizer is known, ``vocab_size`` is padded as Megatron pads it.

        Raises:
            ValueError: for a missing size, widths that do not divide, or a setting not counted.
        """

        def get(name: str, default: Any = None) -> Any:
            value = getattr(args, name, None)
            return default if value is None else value

        def need(name: str) -> int:
            if get(name) is None:
                raise ValueError(f"--{name.replace('_', '-')} is not set; costs depend on it")
            return get(name)

        if get("moe_latent_size"):
            raise ValueError(f"--moe-latent-size {args.moe_latent_size} is not counted here; leave it unset")
        hidden, heads = need("hidden_size"), need("num_attention_heads")
        gated = bool(get("swiglu") or get("quick_geglu") or get("gated_linear_unit"))
        groups = get("num_query_groups", 1) if get("group_query_attention", False) else heads
        # The width that Megatron's arguments.py takes: two thirds of 4h in 64s when SwiGLU.
        plain_ffn = int((4 * hidden * 2 / 3) / 64) * 64 if get("swiglu") else 4 * hidden
        ffn = get("ffn_hidden_size", plain_ffn)
        head_dim = get("mamba_head_dim", 64)
        symbols = get("hybrid_layer_pattern") or get("block_mixers", "")
        return cls(
            hidden=hidden,
            padded_vocab=get("padded_vocab_size") or _padded_vocab(args, need("vocab_size")),
            tied=not get("untie_embeddings_and_output_weights", False),
            seq_length=need("seq_length"),
            layer_norm=get("normalization", "LayerNorm") == "LayerNorm",
            bias=get("add_bias_linear", True),
            qkv_bias=get("add_qkv_bias", False),
            qk_norm=get("qk_layernorm", False),
            heads=heads,
            query_groups=groups,
            head_dim=get("kv_channels") or _divide(hidden, heads, "--hidden-size", "heads"),
            output_gate=get("attention_output_gate", False),
            window=get("swa_window", 512),
            sinks=get("swa_sinks", 64),
            mamba_heads=get("mamba_num_heads")
            or _divide(2 * hidden, head_dim, "twice --hidden-size", "--mamba-head-dim"),
            mamba_head_dim=head_dim,
            mamba_groups=get("mamba_num_groups", 8),
            state_dim=get("mamba_state_dim", 128),
            intra=intra_design.design(args) if "P" in symbols else None,
            ffn=ffn,
            gated=gated,
            experts=get("num_experts", 0),
            topk=get("moe_router_topk", 2),
            expert_ffn=get("moe_ffn_hidden_size", ffn),
            shared_ffn=get("moe_shared_expert_intermediate_size", 0),
            shared_gate=get("moe_shared_expert_gate", False),
            delta_key_heads=get("linear_num_key_heads", 16),
            delta_value_heads=get("linear_num_value_heads", 32),
            delta_key_dim=get("linear_key_head_dim", 128),
            delta_value_dim=get("linear_value_head_dim", 128),
            delta_conv_width=get("linear_conv_kernel_dim", 4),
            mtp_repeated=get("mtp_use_repeated_layer", False),
        )


def _padded_vocab(args: Any, vocab_size: int) -> int:
    multiple = (getattr(args, "make_vocab_size_divisible_by", None) or 128) * (
        getattr(args, "tensor_model_parallel_size", None) or 1
    )
    return -(-vocab_size // multiple) * multiple


def _divide(a: int, b: int, a_name: str, b_name: str) -> int:
    if a % b:
        raise ValueError(f"{a_name} is {a}, which does not divide by {b_name} ({b})")
    return a // b


# The linear layers -------------------------------------------------------------------------------
# One table per layer serves both counts: a linear layer [n_in, n_out] has n_in * n_out weights and
# costs 2 * n_in * n_out FLOPs per token forward.

Linear = tuple[int, int]


def _attention_linears(s: Sizes) -> list[Linear]:
    q, kv = s.heads * s.head_dim, s.query_groups * s.head_dim
    return [(s.hidden, q * (1 + s.output_gate) + 2 * kv), (q, s.hidden)]


def _mamba_linears(s: Sizes) -> list[Linear]:
    inner = s.mamba_heads * s.mamba_head_dim
    return [(s.hidden, _ssm_input(s, inner)), (inner, s.hidden)]


def _ssm_input(s: Sizes, inner: int) -> int:
    """Width of z, x, B, C and dt."""
    return 2 * inner + 2 * s.mamba_groups * s.state_dim + inner // s.mamba_head_dim


def _intra_linears(s: Sizes) -> list[Linear]:
    d = _intra(s)
    return [(s.hidden, sum(part.rows for part in d.in_parts)), (sum(d.out_parts.values()), s.hidden)]


def _intra(s: Sizes) -> IntraDesign:
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


def _linears(symbol: str, s: Sizes) -> list[Linear]:
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


def _weights(linears: list[Linear]) -> int:
    return sum(n_in * n_out for n_in, n_out in linears)


# Parameters --------------------------------------------------------------------------------------


def layer_parameters(symbol: str, sizes: Sizes) -> Parameters:
    """Parameters of one layer, its input norm included. The expert bias is a buffer: not counted.

    Raises:
        ValueError: for an unknown symbol or sizes that do not divide.
    """
    s = sizes
    linears = _linears(symbol, s)
    active = _norm(s) + _weights(linears) + _small_parameters(symbol, s)
    if symbol != "E":
        return Parameters(active, active)
    idle = _ffn_linears(s, s.expert_ffn) * (s.experts - s.topk)
    return Parameters(active + _weights(idle) + s.bias * _outputs(idle), active)


def _small_parameters(symbol: str, s: Sizes) -> int:
    """All parameters of a layer but its input norm and weight matrices."""
    if symbol == "M":
        return _ssm_parameters(s, s.mamba_heads * s.mamba_head_dim)
    if symbol == "P":
        return _intra(s).small_parameters()
    if symbol == "G":
        # dt_bias, A_log, the output norm over one head, and a convolution without bias.
        return 2 * s.delta_value_heads + _norm(s, s.delta_value_dim) + _delta_conv(s)
    if symbol in "*W":
        (_, qkv), (_, out) = _attention_linears(s)
        biases = qkv * (s.bias or s.qkv_bias) + out * s.bias
        return biases + 2 * s.qk_norm * _norm(s, s.head_dim)
    # The shared expert's gate has no bias, and the shared expert itself allows none.
    return s.bias * _outputs(_linears(symbol, s)) - s.bias * (symbol == "E") * s.shared_gate


def _outputs(linears: list[Linear]) -> int:
    return sum(n_out for _, n_out in linears)


def _norm(s: Sizes, width: int | None = None) -> int:
    return (1 + s.layer_norm) * (s.hidden if width is None else width)


def _ssm_parameters(s: Sizes, inner: int) -> int:
    """Convolution with bias over x, B and C; A_log, D and dt_bias per head; gated norm."""
    conv = inner + 2 * s.mamba_groups * s.state_dim
    return conv * (CONV_WIDTH + 1) + 3 * (inner // s.mamba_head_dim) + inner


def _delta_conv(s: Sizes) -> int:
    channels = 2 * s.delta_key_heads * s.delta_key_dim + s.delta_value_heads * s.delta_value_dim
    return channels * s.delta_conv_width


def model_parameters(pattern: Pattern, sizes: Sizes) -> ModelParameters:
    """Parameters of a whole model: embedding, layers, final norm, and MTP heads."""
    s = sizes
    embedding = s.padded_vocab * s.hidden * (1 if s.tied else 2)
    layers = [layer_parameters(symbol, s) for symbol in pattern.layers]
    other = _norm(s)
    for _ in range(1 if s.mtp_repeated and pattern.mtp_depths else pattern.mtp_depths):
        layers += [layer_parameters(symbol, s) for symbol in pattern.mtp]
        other += 3 * _norm(s) + 2 * s.hidden * s.hidden  # its three norms; [state; token] -> state
    return ModelParameters(
        total=embedding + other + sum(p.total for p in layers),
        active=embedding + other + sum(p.active for p in layers),
        embedding=embedding,
    )


# FLOPs -------------------------------------------------------------------------------------------


def attention_core_flops(qk_dim: int, value_dim: int, length: int, seen: int | None = None) -> float:
    """Forward FLOPs per token of Q K^T and its product with V, causal, all heads together.

    Query i sees min(i, seen) keys, itself included; the mean over i = 1..length is
    (m (m + 1) / 2 + (length - m) m) / length with m = min(seen, length). A window with sinks is
    the same with seen = window + sinks. Source: arXiv:2510.04800, Table 1.
    """
    m = length if seen is None else min(seen, length)
    keys = (m * (m + 1) / 2 + (length - m) * m) / length
    return 2 * (qk_dim + value_dim) * keys


def ssm_core_flops(inner: int, state_dim: int) -> float:
    """Forward FLOPs per token of the SSM core: 9 d N + 2 d. Source: arXiv:2510.04800, Table 1."""
    return 9 * inner * state_dim + 2 * inner


def delta_core_flops(value_heads: int, key_dim: int, value_dim: int) -> float:
    """Forward FLOPs per token of the gated delta rule: four products of a key and the state.

    Source: Megatron's ``gdn_layer_flops`` (``megatron/training/training.py``).
    """
    return 8 * value_heads * key_dim * value_dim


def _core_flops(symbol: str, s: Sizes) -> float:
    if symbol in "*W":
        width = s.heads * s.head_dim
        seen = s.window + s.sinks if symbol == "W" else None
        return attention_core_flops(width, width, s.seq_length, seen)
    if symbol == "M":
        return ssm_core_flops(s.mamba_heads * s.mamba_head_dim, s.state_dim)
    if symbol == "P":
        d = _intra(s)
        seen = None if d.window is None else d.window + d.sinks
        attention = attention_core_flops(d.qk_dim, d.value_dim, s.seq_length, seen)
        cores = {"attention": attention, "mamba": ssm_core_flops(d.ssm_dim, d.state_dim)}
        return sum(cores[kind] for kind in d.branches)
    if symbol == "G":
        return delta_core_flops(s.delta_value_heads, s.delta_key_dim, s.delta_value_dim)
    return 0.0


def _conv_flops(symbol: str, s: Sizes) -> float:
    if symbol == "G":
        return 2 * _delta_conv(s)
    if symbol not in "MP":
        return 0.0
    states = 2 * s.mamba_groups * s.state_dim
    if symbol == "M":
        return 2 * CONV_WIDTH * (s.mamba_heads * s.mamba_head_dim + states)
    return _intra(s).branches.count("mamba") * 2 * CONV_WIDTH * (_intra(s).ssm_dim + states)


def layer_flops_per_token(symbol: str, sizes: Sizes) -> float:
    """Forward FLOPs per token of one layer, convention ``model``."""
    matmuls = 2 * _weights(_linears(symbol, sizes))
    return matmuls + _conv_flops(symbol, sizes) + _core_flops(symbol, sizes)


def training_flops_per_token(pattern: Pattern, sizes: Sizes, convention: Convention = "model") -> float:
    """Forward and backward FLOPs per token, averaged over a sequence of ``sizes.seq_length``.

    Raises:
        ValueError: for an unknown convention.
    """
    layers = pattern.layers + pattern.mtp * pattern.mtp_depths
    if convention == "study":
        cores = sum(_core_flops(symbol, sizes) for symbol in layers)
        return 6 * model_parameters(pattern, sizes).active_non_embedding + 3 * cores
    if convention != "model":
        raise ValueError(f"the FLOPs convention is {convention!r}; use model or study")
    hidden, depths = sizes.hidden, pattern.mtp_depths
    heads = 2 * hidden * sizes.padded_vocab * (1 + depths)
    forward = heads + 4 * hidden * hidden * depths  # each MTP head joins state and token
    return 3 * (forward + sum(layer_flops_per_token(symbol, sizes) for symbol in layers))


def training_flops(pattern: Pattern, sizes: Sizes, batch_size: int, convention: Convention = "model") -> float:
    """Forward and backward FLOPs of ``batch_size`` whole sequences."""
    per_token = training_flops_per_token(pattern, sizes, convention)
    return per_token * batch_size * sizes.seq_length
