"""Training FLOPs, forward and backward (three times the forward pass), in two conventions.

``model``
    every matrix product that the model needs, the output head, the depthwise convolutions and the chunked scans
    included. Of products with a triangular mask the pairs that the mask leaves count, in attention as in scans: the
    fused kernels of both skip most of the other half. What a backward pass computes again does not count;
``paper``
    six times the active non-embedding parameters, plus the attention and SSM cores, as in
    arXiv:2510.04800 (Table 1 and appendix C): no embedding, no output head.
"""

from typing import Literal

from megatron_hybrid.costs.parameters import (
    DELTA_CHUNK,
    SSD_CHUNK,
    delta_conv,
    intra,
    layer_linears,
    model_parameters,
    weights,
)
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.layers.intra.design import CONV_WIDTH
from megatron_hybrid.pattern import Pattern

Convention = Literal["model", "paper"]


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


def pairs_in_chunks(length: int, chunk: int, masked: bool = True) -> int:
    """Pairs of tokens of one chunk, over all chunks of a sequence; the last one may be shorter.

    Args:
        masked: Only pairs of a token with itself and those before it, q (q + 1) / 2 in a chunk of q; else all q^2.
    """
    whole, rest = divmod(length, chunk)
    if masked:
        return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    return whole * chunk**2 + rest**2


def ssd_scan_flops(inner: int, groups: int, state_dim: int, length: int, masked: bool = True) -> float:
    """Forward FLOPs per token of the chunked Mamba-2 scan's matrix products.

    Per group, C B^T of the pairs in a chunk, 2 N each; all heads of the group share it. Per head, the product of these
    pairs with x, 2 p each: 2 d over all heads. Per token, the outer product B x^T that goes into the chunk's state and
    the product of C with the state before the chunk: 2 d N each. Source: arXiv:2405.21060, section 6;
    ``megatron_hybrid.kernels.ssd``, whose plain products compute the masked half too (``masked=False``).

    Sequences shorter than a chunk are one chunk. Context parallelism changes nothing: each rank scans whole sequences
    of its share of the heads.
    """
    pairs = pairs_in_chunks(length, SSD_CHUNK, masked) / length
    return pairs * 2 * (groups * state_dim + inner) + 4 * inner * state_dim


def delta_core_flops(value_heads: int, key_dim: int, value_dim: int) -> float:
    """Forward FLOPs per token of the gated delta rule: four products of a key and the state.

    The token-by-token count, for convention ``paper``; the paper has no such layer. Source: Megatron's
    ``gdn_layer_flops`` (``megatron/training/training.py``).
    """
    return 8 * value_heads * key_dim * value_dim


def delta_scan_flops(value_heads: int, key_dim: int, value_dim: int, length: int, masked: bool = True) -> float:
    """Forward FLOPs per token of the chunked gated delta rule's matrix products.

    Per value head and pair of a chunk: K K^T, Q K^T and T K, 2 d_k each, T V and the pairs' product with the new
    values, 2 d_v each, where T is the inverse of a triangular [chunk, chunk] matrix. Per token: K and Q times the
    state, and the update of the state, 2 d_k d_v each. The inversion, done by substitution, is not counted.
    Source: core/ssm/gated_delta_net/common.py:801, which pads the last chunk and computes the masked half too.
    """
    pairs = pairs_in_chunks(length, DELTA_CHUNK, masked) / length
    return value_heads * (pairs * (6 * key_dim + 4 * value_dim) + 6 * key_dim * value_dim)


def core_flops_per_token(symbol: str, s: Sizes, convention: Convention = "model") -> float:
    """Forward FLOPs per token of attention, the scan or the delta rule, without projections; 0 of an FFN."""
    if symbol in "*W":
        width = s.heads * s.head_dim
        seen = s.window + s.sinks if symbol == "W" else None
        return attention_core_flops(width, width, s.seq_length, seen)
    if symbol == "M":
        return _scan_flops(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim, s.seq_length, convention)
    if symbol == "P":
        d = intra(s)
        mamba = _scan_flops(d.ssm_dim, d.ssm_groups, d.state_dim, s.seq_length, convention)
        return intra_attention_flops(s) + d.branches.count("mamba") * mamba
    if symbol == "G":
        heads = s.delta_value_heads, s.delta_key_dim, s.delta_value_dim
        return delta_core_flops(*heads) if convention == "paper" else delta_scan_flops(*heads, s.seq_length)
    return 0.0


def intra_attention_flops(s: Sizes) -> float:
    """Forward FLOPs per token of the attention branches of a P layer, without projections."""
    d = intra(s)
    seen = None if d.window is None else d.window + d.sinks
    return d.branches.count("attention") * attention_core_flops(d.qk_dim, d.value_dim, s.seq_length, seen)


def _scan_flops(inner: int, groups: int, state_dim: int, length: int, convention: Convention) -> float:
    if convention == "paper":
        return ssm_core_flops(inner, state_dim)
    return ssd_scan_flops(inner, groups, state_dim, length)


def _conv_flops(symbol: str, s: Sizes) -> float:
    if symbol == "G":
        return 2 * delta_conv(s)
    if symbol not in "MP":
        return 0.0
    if symbol == "M":
        return 2 * CONV_WIDTH * (s.mamba_heads * s.mamba_head_dim + 2 * s.mamba_groups * s.state_dim)
    d = intra(s)
    return d.branches.count("mamba") * 2 * CONV_WIDTH * (d.ssm_dim + 2 * d.ssm_groups * d.state_dim)


def layer_flops_per_token(symbol: str, sizes: Sizes) -> float:
    """Forward FLOPs per token of one layer, convention ``model``."""
    matmuls = 2 * weights(layer_linears(symbol, sizes))
    return matmuls + _conv_flops(symbol, sizes) + core_flops_per_token(symbol, sizes, "model")


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
    if convention == "paper":
        layers = pattern.layers + pattern.mtp * pattern.mtp_depths
        cores = sum(core_flops_per_token(symbol, sizes, "paper") for symbol in layers)
        return 6 * model_parameters(pattern, sizes).active_non_embedding + 3 * cores
    if convention != "model":
        raise ValueError(f"the FLOPs convention is {convention!r}; use model or paper")
    layer_flops = sum(layer_flops_per_token(symbol, sizes) for symbol in pattern.layers)
    return 3 * (layer_flops + head_flops_per_token(sizes) + mtp_flops_per_token(pattern, sizes))


def training_flops(pattern: Pattern, sizes: Sizes, batch_size: int, convention: Convention = "model") -> float:
    """Forward and backward FLOPs of ``batch_size`` whole sequences."""
    per_token = training_flops_per_token(pattern, sizes, convention)
    return per_token * batch_size * sizes.seq_length
