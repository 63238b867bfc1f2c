"""Whether a run may go on from the checkpoint that it loads."""

from argparse import Namespace
from pathlib import Path

from megatron_hybrid.checkpoint import stored_settings
from megatron_hybrid.checkpoint.optimizer_checks import check_optimizer_state
from megatron_hybrid.checkpoint.pickles import check_pickles
from megatron_hybrid.checkpoint.resume import takes_weights_alone


def check_checkpoint(args: Namespace, print_config: bool = False) -> Namespace | None:
    """Refuses to load a checkpoint of another model, or to go on under another schedule; the layout may differ.

    Stage boundaries may differ. Where the run goes on in another layout, its vocabulary stays as it is
    (:func:`keep_vocabulary`).

    Args:
        args: ``checkpoint`` is the folder that :func:`megatron_hybrid.checkpoint.resume.choose_checkpoint` has found.
        print_config: The run ends before it trains: its schedule is not compared.

    Returns:
        The arguments in the checkpoint; None if nothing is loaded, or a checkpoint without those of a hybrid.

    Raises:
        ValueError: With what differs, and both values.
    """
    from megatron.core import dist_checkpointing

    folder = args.checkpoint
    if folder is not None and args.rank == 0:
        check_pickles(Path(folder))
    if folder is None or not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return None
    common = stored_settings.stored_common(folder)
    stored = common.get("args")
    saved = getattr(stored, "hybrid_layer_pattern", None)
    if stored is None or saved is None:
        return None
    if saved.replace("|", "") != args.hybrid_layer_pattern.replace("|", ""):
        raise ValueError(
            f"The checkpoint in {folder} has the layer pattern\n  {saved}\nbut this run asks for\n"
            f"  {args.hybrid_layer_pattern}\nOnly stage boundaries (|) may differ. Change the pattern or the "
            "recipe, or give another --load."
        )
    args.notes += stored_settings.check_model(stored, args, folder)
    if args.ckpt_format == "torch":
        raise ValueError(f"--ckpt-format torch, and the checkpoint in {folder} is of torch_dist: drop the flag.")
    goes_on = not args.skip_train and not takes_weights_alone(args, folder)
    if goes_on:
        check_optimizer_state(args, stored, folder)
    keep_vocabulary(args, stored)
    if goes_on and not print_config:
        args.notes += stored_settings.check_schedule(common, args, folder)
    return stored


def keep_vocabulary(args: Namespace, stored: Namespace) -> None:
    """Pads the vocabulary as the checkpoint does, so that a run that goes on with other tensor parallelism is the same.

    Upstream pads it to a multiple of ranks (core/tokenizers/utils/build_tokenizer.py:140), and fills what a checkpoint
    lacks with random rows: each loss would be another. A note says so where that has to be.

    Args:
        args: Megatron's; ``padded_vocab_size`` is known but for ``--print-config``.
        stored: Those in the checkpoint.
    """
    from megatron.training import global_vars

    size, padded = getattr(stored, "padded_vocab_size", None), args.padded_vocab_size
    if None in (size, padded) or size == padded:
        return
    if global_vars.get_tokenizer().vocab_size <= size and size % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = size
        args.notes.append(f"the vocabulary stays padded to {size}, as in the checkpoint")
    else:
        args.notes.append(f"the vocabulary is padded to {padded} and in the checkpoint to {size}: new rows are random")
