"""Which checkpoints' optimizer states a run takes, going by the flags of both."""

from argparse import Namespace

from megatron_hybrid.argv import flag_name


def check_optimizer_state(args: Namespace, stored: Namespace, folder: str) -> None:
    """Refuses a checkpoint whose optimizer state this run's optimizer does not take, or not in this layout.

    Args:
        args: Megatron's, validated.
        stored: Those in the checkpoint.
        folder: The checkpoint's, for the message.

    Raises:
        ValueError: With what differs, and the ways on.
    """
    if not hasattr(stored, "dist_ckpt_optim_fully_reshardable"):  # of an older Megatron: left to it
        return
    fresh = "give --no-load-optim to go on from the weights, with fresh moments and the schedule from its start"
    if stored.no_save_optim:
        raise ValueError(f"{folder} was saved with --no-save-optim and has no optimizer state: {fresh}.")
    saved, asked = _kind(stored), _kind(args)
    if saved != asked:
        raise ValueError(
            f"The optimizer's state in {folder} was saved {saved}, and this run is {asked}: the state of one does not "
            f"load into the other. Give the flags of the checkpoint, or {fresh}."
        )
    differ = _other_buckets(args, stored)
    if stored.use_distributed_optimizer and not stored.dist_ckpt_optim_fully_reshardable and differ:
        raise ValueError(
            f"The optimizer's state in {folder} has the format dp_reshardable, which loads in the layout that saved it "
            f"and in no other, and this run has {'; '.join(differ)}. Go on in that layout for one save, which has the "
            f"format for any layout (--dist-ckpt-optim-fully-reshardable, the default here), or {fresh}."
        )


def _kind(args: Namespace) -> str:
    """The flags that say which tensors an optimizer has; the distributed one has the same in every precision."""
    if args.use_distributed_optimizer:
        return f"by --optimizer {args.optimizer} with --use-distributed-optimizer"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return f"by --optimizer {args.optimizer} in {precision} without --use-distributed-optimizer"


def _other_buckets(args: Namespace, stored: Namespace) -> list[str]:
    """What cuts the distributed optimizer's buffers, where it differs: core/distributed/param_and_grad_buffer.py."""
    layout = ["tensor_model", "pipeline_model", "expert_model", "expert_tensor"]
    names = [f"{kind}_parallel_size" for kind in layout] + ["hybrid_layer_pattern", "overlap_grad_reduce"]
    names += ["bf16", "fp16", "num_distributed_optimizer_instances", "ddp_pad_buckets_for_high_nccl_busbw"]
    if args.overlap_grad_reduce:  # else there is one bucket
        names += ["ddp_bucket_size", "ddp_num_buckets", "data_parallel_size", "context_parallel_size"]
    return [
        f"{flag_name(name)} {getattr(args, name, None)}, not {getattr(stored, name, None)}"
        for name in names
        if getattr(args, name, None) != getattr(stored, name, None)
    ]
