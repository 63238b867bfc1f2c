"""What the gated delta net needs of flags and layout."""

from argparse import Namespace

from megatron_hybrid.accounting.divisibility import check_divides


def check(args: Namespace) -> None:
    """The heads of ``G`` against each other and against the layout.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    tp = args.tensor_model_parallel_size
    if tp > 1 and not args.sequence_parallel:
        raise ValueError(
            "G layers with --tensor-model-parallel-size > 1 need --sequence-parallel: without it Megatron does not sum "
            "the gradient of their output norm over the ranks."
        )
    check_divides(args.linear_num_value_heads, "--linear-num-value-heads", args.linear_num_key_heads, "key heads")
    parallel = tp * args.context_parallel_size
    check_divides(args.linear_num_key_heads, "--linear-num-key-heads", parallel, "tensor x context parallel size")
