"""Hooks in Megatron's training loop: the FLOPs counter, batches, and the run's own file."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any


def count_flops_with(flops: Callable[[int], float]) -> None:
    """Replaces Megatron's FLOPs counter (training/training.py:390), which counts P and W as nothing.

    Args:
        flops: Batch size in samples to the training FLOPs of one step.
    """
    from megatron.training import training

    def num_floating_point_operations(
        args: Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        return flops(batch_size)

    training.num_floating_point_operations = num_floating_point_operations


def draw_batches_that_are_skipped() -> None:
    """Replaces what ``--iterations-to-skip`` does with a batch (training/training.py:2289): it is drawn, and no more.

    Upstream broadcasts it, too, with an attention mask that the data sets do not make (ranks would wait for ever), and
    draws from stages that read nothing and from lists of iterators (TypeError).
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    def dummy_train_step(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in filter(None, iterators):
                for _ in range(get_num_microbatches()):
                    next(iterator)

    training.dummy_train_step = dummy_train_step


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
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import (
        get_attr_wrapped_model,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
    )
    from megatron.training.global_vars import get_args, get_tokenizer

    args = get_args()
    samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    if not (first or last or args.reset_attention_mask):
        return dict.fromkeys((*names, "documents"))
    batch: dict[str, Any] = {}
    device = torch.cuda.current_device()
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {name: sample[name].to(device, non_blocking=True) for name in names}
        batch["attention_mask"] = batch["cu_seqlens"] = None
    documents = None
    if args.reset_attention_mask:
        if batch:
            documents = document_ids(batch["tokens"], get_tokenizer().eod)
        else:
            documents = torch.empty(samples, args.seq_length, dtype=torch.int32, device=device)
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(documents, mpu.get_tensor_model_parallel_src_rank(), group)
    if not (first or last):
        return {**dict.fromkeys(names), "documents": documents}
    batch = get_batch_on_this_tp_rank(
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
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {**{name: batch[name] for name in names}, "documents": documents}


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


def write_run(path: Path, args: Namespace, counted: dict[str, Any]) -> None:
    """Writes what the run is, for people and tools: by rank 0, to a temporary name first.

    Args:
        path: The JSON file.
        args: Validated arguments; all that JSON can hold are stored.
        counted: Derived figures (parameters, FLOPs ...), stored beside them.
    """
    if args.rank != 0:
        return
    flags = {k: v for k, v in sorted(vars(args).items()) if isinstance(v, (str, int, float, bool, list, type(None)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**counted, "args": flags}, indent=1, default=str) + "\n")
    temporary.replace(path)
