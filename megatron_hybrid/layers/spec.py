"""What the spec of a layer is built from: the backend's building blocks and the run's arguments."""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.layers.norm import RMSNorm
from megatron_hybrid.layers.parts import SharedRowsLinear


@dataclass(frozen=True)
class Parts:
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
    """The experts with their router; None where the model has none."""

    def with_shared_rows(self) -> "Parts":
        """For mixers of whose input projection ranks share some rows: Transformer Engine's linears cannot do that."""
        return replace(self, input_norm=RMSNorm, normed_column=SharedRowsLinear)

    def stored_as(self, norm: str, linear: str) -> dict[str, str]:
        """Checkpoints carry the names of upstream's Transformer Engine specs, where norms live inside linears."""
        return {} if self.input_norm is IdentityOp else {norm: linear}


@dataclass(frozen=True)
class Build:
    """What ``spec(symbol, build)`` of a layer's module gets."""

    args: Namespace
    """Megatron's validated arguments and ours."""
    parts: Parts
    mixer_depths: tuple[int, ...]
    """For each layer of the model, the mixers in front of it."""


def mixer_layer(parts: Parts, linear: str, mixer: ModuleSpec) -> ModuleSpec:
    """A layer of a norm and a mixer, which takes the place of self-attention in a ``TransformerLayer``.

    Args:
        linear: The mixer's attribute that is its first linear, ``parts.normed_column``.
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
