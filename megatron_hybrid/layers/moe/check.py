"""What the mixture of experts needs of flags and layout."""

from argparse import Namespace


def check(args: Namespace) -> None:
    """The number of experts, and the dispatcher's need of sequence parallelism.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    if not args.num_experts:
        raise ValueError("The pattern has E layers: give --num-experts (and --moe-router-topk).")
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            "E layers with --tensor-model-parallel-size > 1 need --sequence-parallel: Megatron's token "
            "dispatcher takes each token from one rank."
        )
