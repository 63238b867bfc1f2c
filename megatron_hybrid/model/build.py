"""From Megatron's arguments to the model configuration that its training loop builds."""

from argparse import Namespace

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models import HybridModelConfig

from megatron_hybrid import pattern
from megatron_hybrid.accounting.loss_chunks import fuses_loss
from megatron_hybrid.layers.registry import layers_of
from megatron_hybrid.layers.spec import Build
from megatron_hybrid.model.backends import backend_parts, mtp_block_spec
from megatron_hybrid.model.stack import HybridLayerStack, LayerSpecs


def model_config(args: Namespace) -> HybridModelConfig:
    """The configuration of the model that validated ``args`` describe."""
    result = hybrid_config_from_args(args)
    result.position_embedding_type = "none"  # attention layers own their RoPE
    result.hybrid_stack_spec = stack_spec(args)
    return result


def stack_spec(args: Namespace) -> ModuleSpec:
    """The spec from which upstream's HybridModel builds its decoder: one spec for each kind of layer in the pattern."""
    parts = backend_parts(args.backend, args.num_experts)
    build = Build(args, parts, pattern.parse(args.hybrid_layer_pattern).mixer_depths)
    layers = {layer.symbol: layer.spec(build) for layer in layers_of(args.hybrid_layer_pattern)}
    specs = LayerSpecs(layers, parts.norm, mtp_block_spec(parts), fuses_loss(args))
    return ModuleSpec(module=HybridLayerStack, submodules=specs)
