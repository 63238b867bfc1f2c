"""Hooks in Megatron's training loop: the FLOPs counter and the run's metrics file."""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
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


def write_metrics(path: Path | None, measure: Callable[[list], dict[str, Any]] | None = None) -> None:
    """Appends a JSON line for each training step and each validation to ``path``.

    Wraps ``training_log`` (training/training.py:2568), which every rank calls at each step with that step's
    reduced values, and ``evaluate_and_print_results`` (:4342). The last rank writes, as upstream's own loggers
    do. After a resume an iteration may stand twice: the last record counts.

    Records: iteration, loss, learning_rate, grad_norm, samples, tokens (all so far), seconds (of this step, None
    for the first one of a process), tokens_per_second, skipped; or iteration, validation_loss, validation (name).

    Args:
        path: The file; None writes none.
        measure: Called by every rank at each ``--log-interval`` with the model's chunks on this rank. What it returns
            joins the record and is printed.
    """
    from megatron.training import training
    from megatron.training.global_vars import get_args, get_tensorboard_writer
    from megatron.training.utils import is_last_rank, print_rank_last

    log, evaluate_and_print, evaluate, save = (
        training.training_log,
        training.evaluate_and_print_results,
        training.evaluate,
        training.save_checkpoint_and_time,
    )
    clock: dict[str, float] = {}
    train = training.train
    chunks: list = []

    def append(record: dict[str, Any]) -> None:
        if path and is_last_rank():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def train_model(forward_step: Any, model: list, *args: Any, **kwargs: Any) -> Any:
        chunks[:] = model
        return train(forward_step, model, *args, **kwargs)

    def measured(iteration: int) -> dict[str, Any]:
        found = measure(chunks) if measure and iteration % get_args().log_interval == 0 else {}
        for name, values in found.items():
            if not values:
                continue
            print_rank_last(f" {name}: " + " | ".join(f"{key} {value:.4f}" for key, value in values.items()))
            if writer := get_tensorboard_writer():
                for key, value in values.items():
                    writer.add_scalar(f"{name}/{key}", value, iteration)
        return found

    def training_log(
        loss_dict: dict, total: dict, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        seconds = time.perf_counter() - clock["last"] if "last" in clock else None
        samples, length = get_args().consumed_train_samples, get_args().seq_length
        tokens = (samples - clock.get("samples", 0)) * length
        # the positional order of training_log: loss_scale, report_memory_flag, skipped_iter, grad_norm
        skipped, grad_norm = args[2], args[3]
        losses = {name: _number(value) for name, value in loss_dict.items()}
        append(
            {
                "iteration": iteration,
                "loss": losses.pop("lm loss", None),
                **losses,
                "learning_rate": _number(learning_rate),
                "grad_norm": _number(grad_norm),
                "samples": samples,
                "tokens": samples * length,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds else None,
                "skipped": bool(skipped),
                **measured(iteration),
            }
        )
        result = log(loss_dict, total, learning_rate, iteration, *args, **kwargs)
        clock["last"], clock["samples"] = time.perf_counter(), samples
        return result

    def evaluate_and_print_results(
        prefix: str, forward_step: Any, data: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> None:
        index = 0

        def recorded(*eval_args: Any, **eval_kwargs: Any) -> Any:
            nonlocal index
            losses, other, timelimit = evaluate(*eval_args, **eval_kwargs)
            if not timelimit and losses:
                value = _number(losses.get("lm loss"))
                append({"iteration": iteration, "validation_loss": value, "validation": _name(prefix, index)})
            index += 1
            return losses, other, timelimit

        training.evaluate = recorded
        try:
            evaluate_and_print(prefix, forward_step, data, model, iteration, *args, **kwargs)
        finally:
            training.evaluate = evaluate
        clock.pop("last", None)  # the next step's time would contain the validation

    def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
        clock.pop("last", None)  # the next step's time would contain the save
        return save(*args, **kwargs)

    training.train = train_model
    training.training_log = training_log
    training.save_checkpoint_and_time = save_checkpoint_and_time
    training.evaluate_and_print_results = evaluate_and_print_results


def _name(prefix: str, index: int) -> str:
    split = "test" if "test set" in prefix else "validation"
    return split if index == 0 else f"{split}-{index}"


def _number(value: Any) -> float | None:
    if value is None:
        return None
    return float(value.item() if hasattr(value, "item") else value)


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
            documents = torch.empty(args.micro_batch_size, args.seq_length, dtype=torch.int32, device=device)
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
        micro_batch_size=args.micro_batch_size,
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


def check_loss(loss: Any) -> None:
    """Hands a micro-batch's loss to Megatron's rerun machine, as upstream's own training scripts do.

    It finds NaN and infinity under ``--check-for-nan-in-loss-and-grad`` and spikes under
    ``--check-for-spiky-loss``, and tells faulty hardware from a faulty run (core/rerun_state_machine.py,
    ``validate_result``).
    """
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training.global_vars import get_args

    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for found, name in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            machine.validate_result(loss, found, f"found {name} in the loss", tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=10, context="loss")
        machine.validate_result(loss, spiky, "found a spike in the loss", tolerance=0.0, fatal=False)


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
