"""Micro-batches: what each rank gets of one, those that are skipped, and the FLOPs of a step."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_hybrid.patches.hooks import Wrapper

NAMES = ("tokens", "labels", "loss_mask", "position_ids")


def count_flops(flops: Callable[[int], float]) -> Wrapper:
    """A hook in place of Megatron's FLOPs counter, which counts layers of ours as nothing.

    Args:
        flops: Batch size in samples to the training FLOPs of one step.
    """

    def counting(there: Callable) -> Callable:
        def num_floating_point_operations(
            args: Namespace,
            batch_size: int,
            seqlen_squared_sum_in_batch: float | None = None,
            total_real_tokens_in_batch: float | None = None,
        ) -> float:
            return flops(batch_size)

        return num_floating_point_operations

    return counting


def draw_skipped_batch(there: Callable) -> Callable:
    """A hook in place of what ``--iterations-to-skip`` does with a batch: it is drawn, and no more.

    Upstream broadcasts it, too, with an attention mask that the data sets do not make (ranks would wait for ever), and
    draws from stages that read nothing and from lists of iterators (TypeError).
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    def dummy_train_step(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in filter(None, iterators):
                for _ in range(get_num_microbatches()):
                    next(iterator)

    return dummy_train_step


def next_batch(data_iterator: Any, model: Any) -> dict[str, Any]:
    """This rank's part of the next micro-batch, on its device.

    The first tensor-parallel rank reads and broadcasts; context-parallel ranks keep their zigzag chunks
    (core/utils.py:2119, :2612).

    Args:
        data_iterator: Yields samples on ranks that read, None elsewhere.
        model: The (wrapped) model chunk that the batch is for.

    Returns:
        tokens, labels, position_ids (int64 [b, s / cp]) and loss_mask (float32 [b, s / cp]); None where this
        pipeline stage does not use them. And documents: under ``--reset-attention-mask`` :func:`document_ids` of the
        whole sequence (int32 [b, s]) on every rank of every stage, else None.
    """
    import torch
    from megatron.core import mpu
    from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
    from megatron.training.global_vars import get_args

    args = get_args()
    samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not (first or last or args.reset_attention_mask):
        return dict.fromkeys((*NAMES, "documents"))
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        device = torch.cuda.current_device()
        batch = {name: sample[name].to(device, non_blocking=True) for name in NAMES}
        batch["attention_mask"] = batch["cu_seqlens"] = None
    documents = _broadcast_documents(batch, samples) if args.reset_attention_mask else None
    if not (first or last):
        return {**dict.fromkeys(NAMES), "documents": documents}
    batch = _broadcast(batch, samples, first, last, vp_stage)
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {**{name: batch[name] for name in NAMES}, "documents": documents}


def _broadcast_documents(batch: dict[str, Any], samples: int) -> Any:
    """:func:`document_ids` [b, s] of the first tensor-parallel rank's batch, on all ranks of its group."""
    import torch
    from megatron.core import mpu
    from megatron.training.global_vars import get_args, get_tokenizer

    if batch:
        documents = document_ids(batch["tokens"], get_tokenizer().eod)
    else:
        documents = torch.empty(samples, get_args().seq_length, dtype=torch.int32, device=torch.cuda.current_device())
    group = mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(documents, mpu.get_tensor_model_parallel_src_rank(), group)
    return documents


def _broadcast(batch: dict[str, Any], samples: int, first: bool, last: bool, vp_stage: int | None) -> dict[str, Any]:
    """The first tensor-parallel rank's batch on all ranks of its group, whole sequences."""
    from megatron.core import mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_tp_rank
    from megatron.training.global_vars import get_args

    args = get_args()
    return get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=samples,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers)
        and mtp_on_this_rank(layout=None, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )


def document_ids(tokens: Any, eod: int) -> Any:
    """Which document of its sample each token belongs to, counted from 0.

    A document ends with its EOD token, as upstream's data sets have it (core/datasets/gpt_dataset.py:816).

    Args:
        tokens: Token ids [b, s].
        eod: The tokenizer's id of the end of a document.

    Returns:
        int32 [b, s].
    """
    ends = (tokens == eod).int()
    return (ends.cumsum(1) - ends).int()
