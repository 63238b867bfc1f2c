"""From Megatron's arguments to the model configuration that its training loop builds."""

from argparse import Namespace

from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models import HybridModelConfig

from megatron_hybrid import pattern
from megatron_hybrid.layers.attention.module import RoPE
from megatron_hybrid.layers.intra.design import design
from megatron_hybrid.model.specs import LayerOptions, hybrid_stack_spec


def model_config(args: Namespace) -> HybridModelConfig:
    """The configuration of the model that validated ``args`` describe."""
    result = hybrid_config_from_args(args)
    result.position_embedding_type = "none"  # attention layers own their RoPE
    result.hybrid_stack_spec = hybrid_stack_spec(args.backend, layer_options(args), args.num_experts)
    return result


def layer_options(args: Namespace) -> LayerOptions:
    """The layers' settings beside TransformerConfig."""
    rotary = args.position_embedding_type == "rope"
    scaling = args.rope_scaling_factor if args.use_rope_scaling else None
    return LayerOptions(
        rope=RoPE(args.rotary_base, args.rotary_percent, scaling) if rotary else None,
        swa_rope=RoPE(args.swa_rotary_base, args.rotary_percent) if rotary else None,
        swa_window=args.swa_window,
        swa_sinks=args.swa_sinks,
        intra=design(args) if "P" in args.hybrid_layer_pattern else None,
        mixer_depths=pattern.parse(args.hybrid_layer_pattern).mixer_depths,
        tensor_parallel_size=args.tensor_model_parallel_size,
        shares_mamba_groups=args.mamba_num_groups < args.tensor_model_parallel_size,
        mamba_a_init_range=tuple(args.mamba_a_init_range),
        recompute=tuple(args.hybrid_recompute),
        packed=args.reset_attention_mask,
    )
