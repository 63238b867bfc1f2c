"""Costs of softmax attention: ``*``, over all tokens before a query, and ``W``, over a window and sinks."""

from typing import Any

from megatron_hybrid.accounting.attention_core import (
    attention_core_flops,
    cached_positions,
    core_kernel,
    is_masked,
    kernel_in_words,
    keys_and_values,
    masks,
    refuse_dropout,
    rope,
)
from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.saved import FP32, Rank, Saved
from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, linear, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections, scatter
from megatron_hybrid.layers.account import Account

ROPE_SETTINGS = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "softmax_type",
    "qk_layernorm",
    "qk_l2_norm",
)
"""What every layer with attention stores."""
LONG_ROPE_SETTINGS = ("rotary_base", "use_rope_scaling", "rope_scaling_factor")
"""What those over all tokens store beside them."""


class AttentionAccount(Account):
    """``*``."""

    empty_mlp = True
    recompute = {}
    stored_settings = ROPE_SETTINGS + LONG_ROPE_SETTINGS

    def window(self, s: Sizes) -> int | None:
        """Keys that a query sees beside the sinks; None: all before it."""
        return None

    def linears(self, s: Sizes) -> list[Linear]:
        q, kv = s.heads * s.head_dim, int(s.query_groups * s.head_dim)
        return [(s.hidden, q * (1 + s.output_gate) + 2 * kv), (q, s.hidden)]

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        qkv, out = self.linears(s)
        qk_norms = norm_sizes(s, s.head_dim) * 2 if s.qk_norm else []
        return dense(norm_sizes(s) + linear(out, s.bias) + linear(qkv, s.bias or s.qkv_bias) + qk_norms)

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        return self.linears(s)

    def conv_flops(self, s: Sizes) -> float:
        return 0.0

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        width, window = s.heads * s.head_dim, self.window(s)
        return attention_core_flops(width, width, s.seq_length, None if window is None else window + s.sinks)

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        return self.between_projections(s) if "core_attn" in modules else 0.0

    def cache(self, s: Sizes, length: int) -> Cache:
        positions = cached_positions(length, self.window(s), s.sinks)
        return Cache(key_value=positions * max(1, s.query_groups) * 2 * s.head_dim)

    def saved(self, r: Rank) -> list[Saved]:
        refuse_dropout(r)
        s, t, e, cp = r.s, r.tokens, r.e, r.layout.cp
        seen = self.window(s)
        te = r.settings.backend == "te" and seen is None and not r.settings.packed
        q, kv = s.heads * s.head_dim, max(1, s.query_groups) * s.head_dim
        projected = q + 2 * kv
        if s.query_groups < 1:  # upstream gathers all ranks' (core/transformer/attention.py:1839)
            projected = (r.whole.heads + 2 * r.whole.query_groups) * s.head_dim
        before = [Saved("q k v projection, of which v is a view", (t, projected), e)]
        # without RoPE q is a copy all the same where key heads interrupt it: its heads are made one dimension
        rotated = [Saved("q", (t, q), e)] * (r.settings.rope or s.query_groups > 1)
        rotated += [Saved("k after RoPE", (t, kv), e)] * r.settings.rope
        one_kernel = not r.cpu and s.query_groups >= 1
        if one_kernel:  # which copies all of them (layers/attention/rotated_heads.py)
            before, rotated = [Saved("v", (t, kv), e)], [Saved("q", (t, q), e), Saved("k", (t, kv), e)]
        table = rope(r, s.head_dim, one_kernel)
        out = [Saved("output, input of the output projection", (t, q), e)]
        if r.settings.eight_bit == "delayed":  # other recipes quantise it again (core/transformer/attention.py:427)
            out.append(Saved("output in 8 bits", (t, q), r.operand))
        if not r.keeps("core_attn"):
            return [*table, *before, *rotated, *out]
        core = [Saved("log-sum-exp", (t, s.heads), FP32), *masks(r, seen)]
        kernel = core_kernel(r.settings, (s.head_dim, s.head_dim), is_masked(r, seen), cp > 1)
        if kernel == "flex":  # it takes contiguous copies
            q_k_v = [Saved("q", (t, q), e), Saved("k, v", (2, t * cp, kv), e)]
            core.append(Saved("output before its transposition", (t, q), e))
        elif cp > 1 and not te:
            q_k_v = [*(rotated[:1] or before), Saved("k, v of all ranks", (2, t * cp, kv), e)]
            core.append(Saved("outputs of two chunks", (t, q), e))
        else:
            q_k_v = before + rotated
        return [*table, *q_k_v, *core, *out]

    def kernels(self, args: Any) -> str | None:
        if args.backend == "te" and not args.reset_attention_mask:
            return "Transformer Engine"
        return kernel_in_words(args, (args.kv_channels, args.kv_channels), None)

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        s, tp = m.sizes, m.layout.tp
        found = projections(m)
        if s.query_groups < tp:  # core/transformer/attention.py:1852
            ((_, projected), _) = self.linears(s)
            whole = scatter(tp, m.size(projected))
            found.append(Exchange("tensor", whole, whole))
        width = max(1, s.query_groups // tp) * s.head_dim
        return [*found, keys_and_values(m, (width, width))]

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        return 0

    def not_cut(self, s: Sizes) -> int:
        return norm(s) + s.hidden * s.bias


class WindowAccount(AttentionAccount):
    """``W``: a query sees the last ``s.window`` tokens, itself included, and the first ``s.sinks``."""

    stored_settings = (*ROPE_SETTINGS, "swa_window", "swa_sinks", "swa_rotary_base")

    def window(self, s: Sizes) -> int | None:
        return s.window

    def kernels(self, args: Any) -> str | None:
        return kernel_in_words(args, (args.kv_channels, args.kv_channels), args.swa_window)
