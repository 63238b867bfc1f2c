"""Training FLOPs, forward and backward (three times the forward pass), in two conventions.

``model``
    every matrix product that the model needs, the output head, the depthwise convolutions and the chunked scans
    included. Of products with a triangular mask the pairs that the mask leaves count, in attention as in scans: the
    fused kernels of both skip most of the other half. What a backward pass computes again does not count;
``paper``
    six times the active non-embedding parameters, plus the attention and SSM cores, as in
    arXiv:2510.04800 (Table 1 and appendix C): no embedding, no output head.
"""

from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.costs.parameters import model_parameters
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern


def core_flops_per_token(symbol: str, s: Sizes, convention: Convention = "model") -> float:
    """Forward FLOPs per token of attention, the scan or the delta rule, without projections; 0 of an FFN."""
    return account(symbol).core_flops(s, convention)


def layer_flops_per_token(symbol: str, sizes: Sizes) -> float:
    """Forward FLOPs per token of one layer, convention ``model``."""
    return account(symbol).flops(sizes)


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
