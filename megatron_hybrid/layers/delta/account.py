"""Costs of the gated delta net: ``G``."""

from math import ceil

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.accounting.saved import FP32, Rank, Saved, projected_columns
from megatron_hybrid.accounting.saved import norm as saved_norm
from megatron_hybrid.accounting.scan import Convention, pairs_in_chunks
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, linear, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, by_heads, projections
from megatron_hybrid.layers.account import Account

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule (core/ssm/gated_delta_net/common.py:807, ``chunk_size``)."""


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


def conv_weights(s: Sizes) -> int:
    """Elements of the depthwise convolution over q, k and v."""
    channels = 2 * s.delta_key_heads * s.delta_key_dim + s.delta_value_heads * s.delta_value_dim
    return channels * s.delta_conv_width


class DeltaAccount(Account):
    """``G``."""

    empty_mlp = True
    recompute = {}
    stored_settings = (
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
    )

    def linears(self, s: Sizes) -> list[Linear]:
        qk, value = s.delta_key_heads * s.delta_key_dim, s.delta_value_heads * s.delta_value_dim
        return [(s.hidden, 2 * qk + 2 * value + 2 * s.delta_value_heads), (value, s.hidden)]

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        """dt_bias, A_log, the input projection, a convolution without bias, the output norm of a head, the output."""
        project, out = self.linears(s)
        heads = s.delta_value_heads
        head_norm = norm_sizes(s, s.delta_value_dim)
        mixer = [heads, heads, *linear(project, False), conv_weights(s), *head_norm, *linear(out, False)]
        return dense(norm_sizes(s) + mixer)

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        (hidden, width), out = self.linears(s)
        return [(hidden, padded_rows(width, eight_bit=True)), out]

    def conv_flops(self, s: Sizes) -> float:
        return 2 * conv_weights(s)

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        heads = s.delta_value_heads, s.delta_key_dim, s.delta_value_dim
        return delta_core_flops(*heads) if convention == "paper" else delta_scan_flops(*heads, s.seq_length)

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        return 0.0

    def cache(self, s: Sizes, length: int) -> Cache:
        """A convolution over q, k and v, and one [key, value] matrix for each value head (core/ssm/gated_delta_net)."""
        return Cache(conv=conv_weights(s), state=s.delta_value_heads * s.delta_key_dim * s.delta_value_dim)

    def saved(self, r: Rank) -> list[Saved]:
        """core/ssm/gated_delta_net/{gdn,common}.py; under context parallelism whole samples of fewer heads."""
        s, cp, e, b = r.s, r.layout.cp, r.e, r.layout.micro_batch
        t, value_heads = r.tokens * cp, s.delta_value_heads / cp
        qk, v = s.delta_key_heads * s.delta_key_dim / cp, value_heads * s.delta_value_dim
        taps = s.delta_conv_width - 1
        lines = [
            Saved("q k v, samples first", (t, 2 * qk + v), e),
            Saved("q k v after the convolution", (t + b * taps, 2 * qk + v), e),
            Saved("q, k before their norms", (t, 2 * qk), e),
            Saved("q, k: 1 / norm", (2, t, s.delta_key_heads / cp), e),
            Saved("decay's factors", (2, t, value_heads), FP32),
            Saved("beta", (t, value_heads), e),
        ]
        gated_norm = [
            *saved_norm(r, t * value_heads, s.delta_value_dim),
            Saved("normed, its gate, the gate activated", (t, v, 1), e + 2 * FP32),
            Saved("input of the output projection", (r.tokens, v * cp), r.operand),
        ]
        _, weight = projected_columns(r, self.linears(s)[0][1])
        return [*weight, *lines, *(_torch_rule if r.cpu else _fla_rule)(r, t, value_heads), *gated_norm]

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        """The projected input to whole sequences of some heads, the result back (core/ssm/gated_delta_net)."""
        ((_, projected), (value, _)) = self.linears(m.local)
        return [*projections(m), by_heads(m, [projected, value])]

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        return 0

    def not_cut(self, s: Sizes) -> int:
        return norm(s) + s.delta_value_dim * (1 + s.layer_norm)


def _torch_rule(r: Rank, tokens: float, heads: float) -> list[Saved]:
    """The plain torch path, in fp32 and padded to whole chunks; ``c`` tokens of a chunk."""
    s, c = r.s, DELTA_CHUNK
    chunks = tokens / r.whole.seq_length * ceil(r.whole.seq_length / c)
    t, dk, dv = chunks * c, s.delta_key_dim, s.delta_value_dim
    triangle = (c - 1) * c * (c + 1) // 3  # sum of i (i + 1), i < c: rows and squares of the inversion's loop
    return [
        Saved("q, k", (2, t, heads, dk), FP32),
        Saved("v", (t, heads, dv), FP32),
        Saved("k beta; k beta decayed; k to the chunk's end; q decayed; k decayed", (5, t, heads, dk), FP32),
        Saved("v beta; v new", (2, t, heads, dv), FP32),
        Saved("beta, decays", (4, t, heads), FP32),
        Saved("decays; decays masked; k k; inverse; q k; q k masked", (6, t, heads, c), FP32),
        Saved("rows of the inversion's loop", (chunks, heads, triangle), FP32),
        Saved("state before each chunk", (chunks, heads, dk, dv), FP32),
    ]


def _fla_rule(r: Rank, tokens: float, heads: float) -> list[Saved]:
    """flash-linear-attention's ``ChunkGatedDeltaRuleFunction``."""
    s = r.s
    return [
        Saved("q, k of each value head", (2, tokens, heads, s.delta_key_dim), r.e),
        Saved("v", (tokens, heads, s.delta_value_dim), r.e),
        Saved("decays", (tokens, heads), FP32),
        Saved("inverse", (tokens, heads, DELTA_CHUNK), r.e),
    ]
