"""What the spec of a layer is built from: the modules of a backend and the arguments of the run."""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.layers.norm import InputRMSNorm
from megatron_hybrid.layers.parts import SharedRowsLinear


@dataclass(frozen=True)
class Parts:
    """The modules in which the backends differ."""

    norm: Any
    """Norm that is not followed by a linear."""
    input_norm: Any
    """Norm before a linear; IdentityOp where the linear includes it."""
    normed_column: Any
    """Column-parallel linear after input_norm."""
    mixer_column: Any
    """The same for input projections of mixers, whose rows may be any number: of each head, dt or a gate has one."""
    column: Any
    row: Any
    core_attention: Any
    moe: Any
    """Experts with their router; None where the model has none."""

    def with_shared_rows(self) -> "Parts":
        """For mixers with shared rows in their input projection, which Transformer Engine's linears do not support."""
        return replace(self, input_norm=InputRMSNorm, mixer_column=SharedRowsLinear)

    def stored_as(self, norm: str, linear: str) -> dict[str, str]:
        """A norm's name to its name in checkpoints, which is that of Transformer Engine, whose linears hold norms."""
        return {} if self.input_norm is IdentityOp else {norm: linear}


@dataclass(frozen=True)
class Build:
    """The argument ``build`` of ``spec(symbol, build)`` in a layer's module."""

    args: Namespace
    """Validated arguments: Megatron's and this package's."""
    parts: Parts
    mixer_depths: tuple[int, ...]
    """For each layer of the model, the number of mixers before it."""


def mixer_layer(parts: Parts, linear: str, mixer: ModuleSpec) -> ModuleSpec:
    """A layer of a norm and a mixer: a ``TransformerLayer`` with the mixer in place of self-attention.

    Args:
        linear: The attribute of the mixer that holds its first linear, which follows the norm.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.stored_as("input_layernorm.", f"self_attention.{linear}.layer_norm_"),
        ),
    )
