"""Costs of the dense feed-forward layer: ``-``."""

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.saved import Rank, Saved, ffn
from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, ffn_linears, ffn_tensors, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections
from megatron_hybrid.layers.account import Account

ACTIVATION_SETTINGS = (
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "onnx_safe",
    "activation_func_clamp_value",
    "glu_linear_offset",
)
"""What every feed-forward layer stores."""


class FFNAccount(Account):
    """``-``."""

    empty_mlp = False
    recompute = {"--recompute-modules": ("mlp",)}
    stored_settings: tuple[str, ...] = ACTIVATION_SETTINGS

    def linears(self, s: Sizes) -> list[Linear]:
        return ffn_linears(s, s.ffn)

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        return dense(norm_sizes(s) + ffn_tensors(s, s.ffn))

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        return self.linears(s)

    def conv_flops(self, s: Sizes) -> float:
        return 0.0

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        return 0.0

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        return self.flops(s) if "mlp" in modules else 0.0

    def cache(self, s: Sizes, length: int) -> Cache:
        return Cache()

    def saved(self, r: Rank) -> list[Saved]:
        return ffn(r, r.tokens, r.s.ffn) if r.keeps("mlp") else []

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        return projections(m, "mlp")

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        return 0

    def not_cut(self, s: Sizes) -> int:
        return norm(s) + s.hidden * s.bias
