"""Upstream's dense feed-forward layer."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_hybrid.layers.spec import Build


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``-``."""
    parts = build.parts
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
