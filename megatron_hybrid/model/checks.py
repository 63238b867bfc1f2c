"""What a model and a layout must satisfy, said before anything is built."""

from argparse import Namespace

from megatron_hybrid import pattern
from megatron_hybrid.model.intra_sizes import IntraSizes, intra_sizes


def check(args: Namespace) -> None:
    """Checks Megatron's parsed (not yet validated) arguments.

    Raises:
        ValueError: The first rule that is broken, with the values and the remedy.
    """
    layers = pattern.parse(args.hybrid_layer_pattern)
    counts = layers.counts()
    check_world(args)
    check_positions(args)
    check_unsupported(args)
    if counts["*"] or counts["W"]:
        _divides(args.num_attention_heads, "--num-attention-heads", _tp(args), "--tensor-model-parallel-size")
    if counts["M"]:
        heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
        check_mamba(args, heads, "--mamba-num-heads")
    if counts["P"]:
        sizes = intra_sizes(args)
        check_intra(args, sizes)
        check_mamba(args, sizes.ssm_dim // args.mamba_head_dim, "the heads of --intra-ssm-dim")
    if counts["E"] and not args.num_experts:
        raise ValueError("The pattern has E layers: give --num-experts (and --moe-router-topk).")
    if counts["E"] and _tp(args) > 1 and not args.sequence_parallel:
        raise ValueError(
            "E layers with --tensor-model-parallel-size > 1 need --sequence-parallel: Megatron's token "
            "dispatcher takes each token from one rank."
        )


def check_world(args: Namespace) -> None:
    """The number of processes against the layout."""
    size = _tp(args) * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % size:
        raise ValueError(
            f"{args.world_size} processes do not divide into model replicas of {size} "
            f"(tensor {_tp(args)} x pipeline {args.pipeline_model_parallel_size} x context "
            f"{args.context_parallel_size}): start a multiple of {size} with torchrun --nproc_per_node."
        )


def check_positions(args: Namespace) -> None:
    """Position flags are translated for each layer's own RoPE, or refused."""
    kind = args.position_embedding_type
    if kind not in ("rope", "none"):
        raise ValueError(
            f"--position-embedding-type {kind}: hybrid layers take rope (each attention layer has its own "
            "table) or none."
        )
    if args.rotary_seq_len_interpolation_factor is not None:
        raise ValueError(
            "--rotary-seq-len-interpolation-factor is not used by hybrid layers: use --use-rope-scaling with "
            "--rope-scaling-factor."
        )


def check_unsupported(args: Namespace) -> None:
    """Flags of upstream that our layers would ignore, or that need what is not installed."""
    refused = {
        "reset_position_ids": "position ids do not reach the layers' RoPE",
        "reset_attention_mask": "the layers are causal over the whole sample; packed documents are not there yet",
        "multi_latent_attention": "the symbols * and W are ordinary grouped-query attention",
    }
    for name, reason in refused.items():
        if getattr(args, name, False):
            raise ValueError(f"--{name.replace('_', '-')} is not supported: {reason}. Drop it.")
    if args.backend == "torch" and (args.fp8 or getattr(args, "fp4", None)):
        raise ValueError("--fp8-format / --fp4-format need Transformer Engine: use --backend te on a CUDA device.")
    if args.normalization != "RMSNorm":
        raise ValueError(
            f"--normalization {args.normalization}: hybrid layers use RMSNorm; add --normalization RMSNorm."
        )


def check_mamba(args: Namespace, heads: int, heads_flag: str) -> None:
    """The divisibility rules of upstream's mixer (core/ssm/mamba_mixer.py:245, mamba_context_parallel.py)."""
    tp, cp, groups = _tp(args), args.context_parallel_size, args.mamba_num_groups
    _divides(heads, heads_flag, tp, "--tensor-model-parallel-size")
    if groups % tp:
        raise ValueError(
            f"--mamba-num-groups {groups} does not divide over --tensor-model-parallel-size {tp}: each rank "
            f"needs whole groups. Set --mamba-num-groups to a multiple of {tp} (this adds B and C parameters)."
        )
    _divides(heads, heads_flag, groups, "--mamba-num-groups")
    if (heads // tp) % cp:
        raise ValueError(
            f"{heads // tp} Mamba heads per tensor-parallel rank do not divide over --context-parallel-size {cp}."
        )
    local = groups // tp
    if local < cp and cp % local or local >= cp and local % cp:
        raise ValueError(
            f"{local} Mamba groups per tensor-parallel rank and --context-parallel-size {cp}: one must divide "
            "the other."
        )


def check_intra(args: Namespace, sizes: IntraSizes) -> None:
    """The widths of P layers against each other and against the layout."""
    tp = _tp(args)
    heads, groups = sizes.num_attention_heads, sizes.num_query_groups
    _divides(heads, "--intra-num-attention-heads", groups, "--intra-num-query-groups")
    _divides(sizes.qk_dim, "--intra-qk-dim", heads, "--intra-num-attention-heads")
    _divides(sizes.value_dim, "--intra-value-dim", heads, "--intra-num-attention-heads")
    _divides(sizes.ssm_dim, "--intra-ssm-dim", args.mamba_head_dim, "--mamba-head-dim")
    _divides(groups, "--intra-num-query-groups", tp, "--tensor-model-parallel-size")
    if sizes.qk_head_dim % 2 and args.position_embedding_type == "rope":
        raise ValueError(f"--intra-qk-dim gives heads of {sizes.qk_head_dim} channels: RoPE needs an even number.")


def _tp(args: Namespace) -> int:
    return args.tensor_model_parallel_size


def _divides(value: int, what: str, by: int, by_what: str) -> None:
    if by < 1 or value % by or value < 1:
        raise ValueError(f"{what} is {value} and must be a multiple of {by_what}, which is {by}.")
