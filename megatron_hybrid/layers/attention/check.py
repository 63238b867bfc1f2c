"""What attention layers need of flags and layout."""

from argparse import Namespace

from megatron_hybrid.accounting.divisibility import check_divides


def check(args: Namespace) -> None:
    """The heads of ``*`` and ``W`` against each other and against the layout.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    heads, flag = args.num_attention_heads, "--num-attention-heads"
    check_divides(heads, flag, args.tensor_model_parallel_size, "--tensor-model-parallel-size")
    if args.kv_channels is None:
        check_divides(args.hidden_size, "--hidden-size", heads, flag)
    if args.group_query_attention:
        check_divides(heads, flag, args.num_query_groups, "--num-query-groups")
    channels = args.kv_channels or args.hidden_size // heads
    if args.position_embedding_type == "rope" and int(channels * args.rotary_percent) % 2:
        raise ValueError(
            f"RoPE turns an even number of channels, and --rotary-percent {args.rotary_percent} of heads with "
            f"{channels} channels is {int(channels * args.rotary_percent)}. Change it, or --kv-channels."
        )


def check_window(args: Namespace) -> None:
    """The same of ``W``, and its window.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    check(args)
    if args.swa_window < 1 or args.swa_sinks < 0:
        raise ValueError(
            f"--swa-window {args.swa_window} --swa-sinks {args.swa_sinks}: a query sees at least itself (window 1) "
            "and no fewer than 0 sinks."
        )
    check_window_dropout(args)


def check_window_dropout(args: Namespace) -> None:
    """Refuses dropout of windowed attention on CUDA.

    Raises:
        ValueError: It is on.
    """
    if args.device == "cuda" and args.attention_dropout:
        raise ValueError(
            f"--attention-dropout {args.attention_dropout} with sliding windows on CUDA: their fused kernel has none. "
            "Set it to 0."
        )
