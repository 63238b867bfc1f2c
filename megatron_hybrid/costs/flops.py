"""Training FLOPs, forward and backward (three times the forward pass), in two conventions.

``model``
    every matrix product that is run, the output head and the depthwise convolutions included;
``study``
    six times the active non-embedding parameters, plus the attention and SSM cores, as in
    arXiv:2510.04800 (Table 1 and appendix C): no embedding, no output head.
"""

from typing import Literal

from megatron_hybrid.costs.parameters import delta_conv, intra, layer_linears, model_parameters, weights
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.intra_design import CONV_WIDTH
from megatron_hybrid.pattern import Pattern

Convention = Literal["model", "study"]


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
        d = intra(s)
        seen = None if d.window is None else d.window + d.sinks
        attention = attention_core_flops(d.qk_dim, d.value_dim, s.seq_length, seen)
        cores = {"attention": attention, "mamba": ssm_core_flops(d.ssm_dim, d.state_dim)}
        return sum(cores[kind] for kind in d.branches)
    if symbol == "G":
        return delta_core_flops(s.delta_value_heads, s.delta_key_dim, s.delta_value_dim)
    return 0.0


def _conv_flops(symbol: str, s: Sizes) -> float:
    if symbol == "G":
        return 2 * delta_conv(s)
    if symbol not in "MP":
        return 0.0
    states = 2 * s.mamba_groups * s.state_dim
    if symbol == "M":
        return 2 * CONV_WIDTH * (s.mamba_heads * s.mamba_head_dim + states)
    return intra(s).branches.count("mamba") * 2 * CONV_WIDTH * (intra(s).ssm_dim + states)


def layer_flops_per_token(symbol: str, sizes: Sizes) -> float:
    """Forward FLOPs per token of one layer, convention ``model``."""
    matmuls = 2 * weights(layer_linears(symbol, sizes))
    return matmuls + _conv_flops(symbol, sizes) + _core_flops(symbol, sizes)


def head_flops_per_token(sizes: Sizes) -> float:
    """Forward FLOPs per token of the output head; the embedding is a lookup and has none."""
    return 2 * sizes.hidden * sizes.padded_vocab


def mtp_flops_per_token(pattern: Pattern, sizes: Sizes) -> float:
    """Forward FLOPs per token of all MTP heads: each joins state and token, and ends in the output head again."""
    layers = sum(layer_flops_per_token(symbol, sizes) for symbol in pattern.mtp)
    return pattern.mtp_depths * (4 * sizes.hidden**2 + layers + head_flops_per_token(sizes))


def training_flops_per_token(pattern: Pattern, sizes: Sizes, convention: Convention = "model") -> float:
    """Forward and backward FLOPs per token, averaged over a sequence of ``sizes.seq_length``.

    Raises:
        ValueError: for an unknown convention.
    """
    if convention == "study":
        layers = pattern.layers + pattern.mtp * pattern.mtp_depths
        cores = sum(_core_flops(symbol, sizes) for symbol in layers)
        return 6 * model_parameters(pattern, sizes).active_non_embedding + 3 * cores
    if convention != "model":
        raise ValueError(f"the FLOPs convention is {convention!r}; use model or study")
    layer_flops = sum(layer_flops_per_token(symbol, sizes) for symbol in pattern.layers)
    return 3 * (layer_flops + head_flops_per_token(sizes) + mtp_flops_per_token(pattern, sizes))


def training_flops(pattern: Pattern, sizes: Sizes, batch_size: int, convention: Convention = "model") -> float:
    """Forward and backward FLOPs of ``batch_size`` whole sequences."""
    per_token = training_flops_per_token(pattern, sizes, convention)
    return per_token * batch_size * sizes.seq_length
