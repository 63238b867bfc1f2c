"""The layers of each symbol, for Transformer Engine and for plain torch."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec, get_moe_module_spec_for_backend
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_hybrid.layers.attention.module import HybridSelfAttention, RoPE, TorchCoreAttention
from megatron_hybrid.layers.intra.design import IntraDesign
from megatron_hybrid.layers.intra.module import IntraHybrid, IntraSubmodules
from megatron_hybrid.layers.mamba.module import HybridMambaMixer
from megatron_hybrid.layers.moe.module import GroupedExperts
from megatron_hybrid.layers.norm import RMSNorm, StandaloneRMSNorm
from megatron_hybrid.layers.parts import SharedRowsLinear
from megatron_hybrid.model.stack import HybridLayerStack, LayerSpecs


@dataclass(frozen=True)
class LayerOptions:
    """The settings of layers that Megatron's TransformerConfig does not carry."""

    rope: RoPE | None
    """Of * and P layers."""
    swa_rope: RoPE | None
    swa_window: int
    swa_sinks: int
    intra: IntraDesign | None
    """None: the model has no P layers."""
    mixer_depths: tuple[int, ...]
    """For each layer, the mixers in front of it."""
    mamba_a_init_range: tuple[float, float]
    tensor_parallel_size: int = 1
    shares_mamba_groups: bool = False
    """Tensor-parallel ranks have less than a group of B and C each."""
    recompute: tuple[str, ...] = ()
    packed: bool = False
    """Packed documents are kept apart: attention needs a core that takes their ids."""


@dataclass(frozen=True)
class _Parts:
    """The building blocks in which the backends differ."""

    norm: Any
    """Norm of its own."""
    input_norm: Any
    """Norm in front of a linear; IdentityOp where the linear does it."""
    normed_column: Any
    """Column-parallel linear behind input_norm."""
    column: Any
    row: Any
    core_attention: Any
    moe: Any

    def with_shared_rows(self) -> "_Parts":
        """For mixers of whose input projection ranks share some rows: Transformer Engine's linears cannot do that."""
        return replace(self, input_norm=RMSNorm, normed_column=SharedRowsLinear)

    def stored_as(self, norm: str, linear: str) -> dict[str, str]:
        """Checkpoints carry the names of upstream's Transformer Engine specs, where norms live inside linears."""
        return {} if self.input_norm is IdentityOp else {norm: linear}


def hybrid_stack_spec(backend: str, options: LayerOptions, num_experts: int | None) -> ModuleSpec:
    """The spec from which upstream's HybridModel builds its decoder.

    Args:
        backend: ``te`` or ``torch``.
        options: Settings of the layers.
        num_experts: Of E layers; None when the model has none.

    Raises:
        ValueError: An unknown backend.
    """
    if backend not in ("te", "torch"):
        raise ValueError(f"Unknown backend {backend!r}: choose te or torch.")
    parts = _te_parts(num_experts) if backend == "te" else _torch_parts(num_experts)
    sliding = {"rope": options.swa_rope, "window": options.swa_window, "sinks": options.swa_sinks}
    core = TorchCoreAttention if options.packed else parts.core_attention
    layers = {
        "M": _mamba_layer(parts.with_shared_rows() if options.shares_mamba_groups else parts, options),
        "*": _mixer_layer(parts, "linear_qkv", _attention(parts, core, rope=options.rope)),
        "W": _mixer_layer(parts, "linear_qkv", _attention(parts, TorchCoreAttention, **sliding)),
        "G": _mixer_layer(parts, "in_proj", _gated_delta_net(parts)),
        "-": _dense_layer(parts),
    }
    if options.intra:
        tp = options.tensor_parallel_size
        shares = any(part.is_shared(tp) for part in options.intra.in_parts)
        intra_parts = parts.with_shared_rows() if shares else parts
        layers["P"] = _mixer_layer(intra_parts, "in_proj", _intra(intra_parts, options, options.intra))
    if parts.moe is not None:
        layers["E"] = _experts_layer(parts)
    unavailable = {} if parts.moe is not None else {"E": "--num-experts is not set"}
    return ModuleSpec(
        module=HybridLayerStack,
        submodules=LayerSpecs(layers, parts.norm, _mtp_block_spec(parts), unavailable),
    )


def _mixer_layer(parts: _Parts, linear: str, mixer: ModuleSpec) -> ModuleSpec:
    """A layer of a norm and a mixer, which stands in the slot of self-attention; ``linear`` is its first one."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.stored_as("input_layernorm.", f"self_attention.{linear}.layer_norm_"),
        ),
    )


def _attention(parts: _Parts, core: Any, **params: Any) -> ModuleSpec:
    return ModuleSpec(
        module=HybridSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **params},
        submodules=SelfAttentionSubmodules(linear_qkv=parts.normed_column, core_attention=core, linear_proj=parts.row),
    )


def _intra(parts: _Parts, options: LayerOptions, design: IntraDesign) -> ModuleSpec:
    return ModuleSpec(
        module=IntraHybrid,
        params={
            "design": design,
            "rope": options.rope,
            "depths": options.mixer_depths,
            "a_init_range": options.mamba_a_init_range,
            "recompute": options.recompute,
        },
        submodules=IntraSubmodules(in_proj=parts.normed_column, out_proj=parts.row),
    )


def _mamba_layer(parts: _Parts, options: LayerOptions) -> ModuleSpec:
    mixer = ModuleSpec(
        module=HybridMambaMixer,
        params={"A_init_range": options.mamba_a_init_range, "recompute": "ssm" in options.recompute},
        submodules=MambaMixerSubmodules(in_proj=parts.normed_column, out_proj=parts.row),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=parts.input_norm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.stored_as("norm.", "mixer.in_proj.layer_norm_"),
        ),
    )


def _dense_layer(parts: _Parts) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=parts.normed_column, linear_fc2=parts.row)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.input_norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.stored_as("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ),
    )


def _experts_layer(parts: _Parts) -> ModuleSpec:
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.norm, mlp=parts.moe, mlp_bda=get_bias_dropout_add
        ),
    )


def _mtp_block_spec(parts: _Parts) -> ModuleSpec:
    """Upstream's hybrid MTP block (core/models/hybrid/hybrid_layer_specs.py:72) with this backend's parts."""
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


def _gated_delta_net(parts: _Parts) -> ModuleSpec:
    """Upstream's gated delta net, on its plain torch path when flash-linear-attention is missing."""
    installed = common.chunk_gated_delta_rule is not None
    return ModuleSpec(
        module=GatedDeltaNet if installed else TorchGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=parts.normed_column, out_norm=parts.norm, out_proj=parts.row),
    )


class TorchGatedDeltaNet(GatedDeltaNet):
    """``deterministic_mode`` selects upstream's torch path, for this layer alone."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        config = copy.copy(config)
        config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)


class _TorchModules(LocalSpecProvider):
    """Upstream's choice of modules without Transformer Engine, with experts of ours."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return partial(GroupedExperts, **super().grouped_mlp_modules(moe_use_grouped_gemm).keywords)


def _torch_parts(num_experts: int | None) -> _Parts:
    return _Parts(
        norm=StandaloneRMSNorm,
        input_norm=RMSNorm,
        normed_column=ColumnParallelLinear,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        core_attention=TorchCoreAttention,
        moe=get_moe_module_spec_for_backend(_TorchModules(), num_experts) if num_experts else None,
    )


def _te_parts(num_experts: int | None) -> _Parts:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return _Parts(
        norm=TENorm,
        input_norm=IdentityOp,
        normed_column=TELayerNormColumnParallelLinear,
        column=TEColumnParallelLinear,
        row=TERowParallelLinear,
        core_attention=TEDotProductAttention,
        moe=get_moe_module_spec(use_te=True, num_experts=num_experts, moe_grouped_gemm=True) if num_experts else None,
    )
