"""Costs of Mamba-2: ``M``."""

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.accounting.saved import FP32, Rank, Saved, projected_columns
from megatron_hybrid.accounting.saved import norm as saved_norm
from megatron_hybrid.accounting.scan import (
    CONV_WIDTH,
    Convention,
    conv_flops,
    scan_cache,
    scan_exchanges,
    scan_flops,
    scan_input,
    scan_saved,
    scan_tensors,
    shared_states,
)
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections, spanning_norm
from megatron_hybrid.layers.account import Account

MAMBA_SETTINGS = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")
"""What every layer with a scan stores."""


class MambaAccount(Account):
    """``M``."""

    empty_mlp = False
    recompute = {"--hybrid-recompute": ("ssm",)}
    stored_settings = MAMBA_SETTINGS

    def linears(self, s: Sizes) -> list[Linear]:
        inner = s.mamba_heads * s.mamba_head_dim
        # z, x, B, C and dt
        width = 2 * inner + 2 * s.mamba_groups * s.state_dim + inner // s.mamba_head_dim
        return [(s.hidden, width), (inner, s.hidden)]

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        inner = s.mamba_heads * s.mamba_head_dim
        shared = shared_states(whole.mamba_groups, s.state_dim, tp)
        own_states = 0 if shared else 2 * s.mamba_groups * s.state_dim
        project = [s.hidden * (2 * inner + own_states + s.mamba_heads), *([s.hidden * shared] if shared else [])]
        mixer = [*scan_tensors(inner + own_states, s.mamba_heads, shared), *project, inner, inner * s.hidden]
        return dense(mixer + norm_sizes(s))  # upstream registers the norm behind the mixer

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        """Without an input projection with rows that ranks share, which is torch's (layers/parts.py)."""
        (hidden, width), out = self.linears(s)
        return [(hidden, padded_rows(width, eight_bit=True)), out][not self.reads_in_8_bits(whole, tp) :]

    def reads_in_8_bits(self, whole: Sizes, tp: int) -> bool:
        return not whole.mamba_groups < tp

    def conv_flops(self, s: Sizes) -> float:
        return conv_flops(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim)

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        return scan_flops(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim, s.seq_length, convention)

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        return self.between_projections(s) if "ssm" in modules else 0.0

    def cache(self, s: Sizes, length: int) -> Cache:
        return scan_cache(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim)

    def saved(self, r: Rank) -> list[Saved]:
        s, t = r.s, r.tokens
        inner = s.mamba_heads * s.mamba_head_dim
        width = 2 * inner + 2 * s.mamba_groups * s.state_dim + s.mamba_heads
        _, weight = projected_columns(r, width, r.whole.mamba_groups)
        out = Saved("normed, input of the output projection", (t, inner), r.operand)
        scan = s.mamba_heads, s.mamba_head_dim, s.mamba_groups, s.state_dim
        if not r.keeps("ssm"):
            return [*weight, scan_input(r, *scan), out]
        core = scan_saved(r, *scan)
        if r.whole.mamba_groups >= r.layout.tp:
            gated_norm = saved_norm(r, t, inner, groups=s.mamba_groups)
        else:  # layers/norm.py: the group's squares are summed over ranks, and the input converted twice
            copies = 1 if r.e == FP32 else 2
            gated_norm = [Saved("norm: input", (copies, t, inner), FP32), Saved("norm: normalised", (t, inner), r.e)]
        return [*weight, *core, *gated_norm, out]

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        s, local = m.sizes, m.local
        inner = local.mamba_heads * s.mamba_head_dim
        found = projections(m, shares_rows=not self.reads_in_8_bits(s, m.layout.tp)) + scan_exchanges(
            m, inner, s.mamba_head_dim, local.mamba_groups, s.state_dim
        )
        if s.mamba_groups < m.layout.tp:
            found.append(spanning_norm(m, s.mamba_groups, "ssm"))
        return found

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        states = shared_states(s.mamba_groups, s.state_dim, tp)
        return states * (CONV_WIDTH + 1) + states * s.hidden

    def not_cut(self, s: Sizes) -> int:
        return norm(s)
