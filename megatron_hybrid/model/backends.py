"""The modules that layers are built from, in plain torch and in Transformer Engine."""

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec, get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.layers.aligned_linear import AlignedColumnLinear
from megatron_hybrid.layers.attention.module import TorchCoreAttention
from megatron_hybrid.layers.moe.module import GroupedExperts
from megatron_hybrid.layers.norm import InputRMSNorm, StandaloneRMSNorm
from megatron_hybrid.layers.spec import Parts


def backend_parts(backend: str, num_experts: int | None) -> Parts:
    """The modules of a backend.

    Args:
        backend: ``te`` or ``torch``.
        num_experts: Experts of a mixture-of-experts layer; None where the model has none.

    Raises:
        ValueError: The backend is unknown.
    """
    backends = {"te": te_parts, "torch": torch_parts}
    if backend not in backends:
        raise ValueError(f"Unknown backend {backend!r}: choose te or torch.")
    return backends[backend](num_experts)


class TorchModules(LocalSpecProvider):
    """Upstream's modules without Transformer Engine, but with :class:`GroupedExperts`."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return partial(GroupedExperts, **super().grouped_mlp_modules(moe_use_grouped_gemm).keywords)


def torch_parts(num_experts: int | None) -> Parts:
    return Parts(
        norm=StandaloneRMSNorm,
        input_norm=InputRMSNorm,
        normed_column=ColumnParallelLinear,
        mixer_column=AlignedColumnLinear,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        core_attention=TorchCoreAttention,
        moe=get_moe_module_spec_for_backend(TorchModules(), num_experts) if num_experts else None,
    )


def te_parts(num_experts: int | None) -> Parts:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from megatron_hybrid.layers.aligned_te_linear import AlignedNormColumnLinear

    return Parts(
        norm=TENorm,
        input_norm=IdentityOp,
        normed_column=TELayerNormColumnParallelLinear,
        mixer_column=AlignedNormColumnLinear,
        column=TEColumnParallelLinear,
        row=TERowParallelLinear,
        core_attention=TEDotProductAttention,
        moe=get_moe_module_spec(use_te=True, num_experts=num_experts, moe_grouped_gemm=True) if num_experts else None,
    )


def mtp_block_spec(parts: Parts) -> ModuleSpec:
    """Upstream's hybrid MTP block (core/models/hybrid/hybrid_layer_specs.py:72) with the modules of this backend."""
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=parts.norm,
            hnorm=parts.norm,
            eh_proj=parts.column,
            mtp_model_layer=None,
            layer_norm=parts.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )
