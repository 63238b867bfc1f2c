"""Rules of ``--fp8-format``: what 8-bit products need of the GPU, the batch and the layers' widths."""

from argparse import Namespace

from megatron_hybrid import costs
from megatron_hybrid.accounting.projection import EIGHT_BIT_ALIGNMENT
from megatron_hybrid.layers.account import NotDeclared
from megatron_hybrid.layers.registry import layers_of

CAPABILITIES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Recipe to the least CUDA capability (transformer_engine/pytorch/quantization.py)."""
NEEDS_WHOLE_WEIGHTS = {
    "fp8_param_gather": "weights are 8-bit tensors, to which no rows can be added",
    "delay_wgrad_compute": "delayed gradients have the rows that were added",
}
"""Settings that a weight with rows of zeros behind it cannot have, and why."""


def check(args: Namespace) -> None:
    """Refuses what Transformer Engine would end the first step for, and what our padding does not support.

    Raises:
        ValueError: With the value, the rule and the remedy.
    """
    recipe, own = args.fp8_recipe or "delayed", getattr(args, "device_capability", None)
    needed = CAPABILITIES.get(recipe, (8, 9))
    if own is not None and tuple(own) < needed:
        fit = [name for name, least in CAPABILITIES.items() if least <= tuple(own)]
        remedy = f"use --fp8-recipe {' or '.join(fit)}" if fit else "drop --fp8-format"
        raise ValueError(
            f"--fp8-recipe {recipe} needs a GPU of capability {needed[0]}.{needed[1]}, and this one's is "
            f"{own[0]}.{own[1]}: {remedy}."
        )
    tp = args.tensor_model_parallel_size
    ranks = args.context_parallel_size * (tp if args.sequence_parallel else 1)
    tokens = args.micro_batch_size * args.seq_length // ranks
    if tokens % EIGHT_BIT_ALIGNMENT:
        raise ValueError(
            f"--fp8-format: a micro-batch has {tokens} tokens on each rank, and 8-bit products need a multiple of "
            f"{EIGHT_BIT_ALIGNMENT}: change --seq-length or --micro-batch-size."
        )
    _check_widths(args)


def _check_widths(args: Namespace) -> None:
    """The widths of all linear layers on a rank; those of mixers' input projections are padded."""
    tp = args.tensor_model_parallel_size
    layout = costs.Layout(tp=tp, ep=args.expert_model_parallel_size, etp=args.expert_tensor_parallel_size or tp)
    try:
        sizes = costs.sizes_of(Namespace(**{**vars(args), "padded_vocab_size": 1}))
    except ValueError:
        return  # a setting that costs do not know: Transformer Engine checks for itself
    local = layout.shard(sizes)
    for layer in layers_of(args.hybrid_layer_pattern):
        try:
            linears = layer.account.eight_bit_linears(sizes, local, layout.tp)
        except NotDeclared:
            continue  # a layer from outside the package, whose products need not be Transformer Engine's
        for shape in linears:
            if any(width % EIGHT_BIT_ALIGNMENT for width in shape):
                raise ValueError(
                    f"--fp8-format: {layer.symbol} layers have a linear of {shape[0]} x {shape[1]} on each rank, and "
                    f"8-bit products need multiples of {EIGHT_BIT_ALIGNMENT}: change the widths or "
                    "--tensor-model-parallel-size."
                )
        if set(linears) - set(layer.account.linears(local)):
            for name, reason in NEEDS_WHOLE_WEIGHTS.items():
                if getattr(args, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} with --fp8-format and {layer.symbol} layers, whose input "
                        f"projection is padded to a multiple of {EIGHT_BIT_ALIGNMENT} rows: {reason}. Drop it."
                    )
