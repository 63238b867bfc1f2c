"""What layers with a Mamba-2 scan need of flags and layout."""

from argparse import Namespace

from megatron_hybrid.accounting.divisibility import check_divides, check_shares


def check(args: Namespace) -> None:
    """The heads and groups of ``M``.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    check_initial_decay(args)
    check_scan(args, args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim, "--mamba-num-heads")
    shares_groups = args.mamba_num_groups < args.tensor_model_parallel_size
    check_memory_efficient_path(args, shares_groups)
    if shares_groups and args.layernorm_zero_centered_gamma:
        raise ValueError(
            f"--apply-layernorm-1p is not supported with --mamba-num-groups {args.mamba_num_groups} below "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: norms of such layers are plain. Drop it."
        )


def check_initial_decay(args: Namespace) -> None:
    """The range that -A starts from.

    Raises:
        ValueError: It is no range of positive numbers.
    """
    low, high = args.mamba_a_init_range
    if not 0 < low <= high:
        raise ValueError(f"--mamba-a-init-range {low} {high}: give two numbers with 0 < low <= high.")


def check_scan(args: Namespace, heads: int, heads_flag: str) -> None:
    """The divisibility rules of upstream's mixer (core/ssm/mamba_mixer.py:245, mamba_context_parallel.py).

    Raises:
        ValueError: With the values and the rule.
    """
    tp, cp, groups = args.tensor_model_parallel_size, args.context_parallel_size, args.mamba_num_groups
    check_divides(heads, heads_flag, tp, "--tensor-model-parallel-size")
    check_divides(heads, heads_flag, groups, "--mamba-num-groups")
    check_shares(groups, "--mamba-num-groups", tp)
    if (heads // tp) % cp:
        raise ValueError(
            f"{heads // tp} Mamba heads per tensor-parallel rank do not divide over --context-parallel-size {cp}."
        )
    local = max(1, groups // tp)
    if local < cp and cp % local or local >= cp and local % cp:
        raise ValueError(
            f"{local} Mamba groups per tensor-parallel rank and --context-parallel-size {cp}: one must divide "
            "the other."
        )


def check_memory_efficient_path(args: Namespace, needed: bool) -> None:
    """Refuses to switch off the path that shared groups and ``P`` need.

    Raises:
        ValueError: It is needed and off.
    """
    if needed and not args.use_mamba_mem_eff_path:
        raise ValueError(
            "--disable-mamba-mem-eff-path cannot be combined with P layers, nor with fewer --mamba-num-groups than "
            "--tensor-model-parallel-size: Megatron's other path takes neither. Drop it."
        )
