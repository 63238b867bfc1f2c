"""What a run measures of itself: metrics.jsonl, and a line on throughput and memory at each --log-interval."""

import json
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.costs.hardware import Precision, gpu_of_device

Measure = Callable[[list], dict[str, dict[str, float]]]
"""The model's chunks on this rank to values by name, in groups."""


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at best."""

    tflops: float
    """Dense, in TFLOP/s."""
    name: str
    """Whose peak, and of what arithmetic."""


def peak(args: Namespace) -> Peak | None:
    """The peak that MFU is stated against: ``--peak-tflops``, else that of this rank's GPU; None if it is not known.

    The precision is that of the activations, with ``--fp8-format`` too: fp8 is for the linear layers of Transformer
    Engine, while attention, scans and router stay in bf16, and a bf16 run stays comparable. To state MFU against the
    fp8 peak, give it as ``--peak-tflops``.
    """
    if args.peak_tflops is not None:
        return Peak(args.peak_tflops, "--peak-tflops")
    if args.device != "cuda":
        return None
    import torch

    gpu = gpu_of_device(torch.cuda.get_device_name(args.local_rank))
    if gpu is None:
        return None
    float32: Precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    precision: Precision = "bf16" if args.bf16 else "fp16" if args.fp16 else float32
    return Peak(gpu.peak(precision) / 1e12, f"{gpu.title}, {precision} dense")


def peak_notes(args: Namespace, known: Peak | None) -> list[str]:
    """What to say at a run's start where there is no peak."""
    if known:
        return []
    what, where = "process", "on the CPU engine"
    if args.device == "cuda":
        import torch

        what, where = "GPU", f"for {torch.cuda.get_device_name(args.local_rank)!r}"
    return [f"MFU is not logged: no peak is known {where}. Give that of one {what} with --peak-tflops N."]


def write_metrics(
    path: Path | None, flops: Callable[[int], float], peak: Peak | None, measure: Measure | None = None
) -> None:
    """Appends a JSON line for each training step and each validation to ``path``; says the throughput in the log.

    Wraps ``training_log`` (training/training.py:2568), which every rank calls at each step with that step's
    reduced values, and ``evaluate_and_print_results`` (:4342). The last rank writes, as upstream's own loggers
    do. After a resume an iteration may stand twice: the last record counts.

    Records: iteration, loss, learning_rate, grad_norm, samples, tokens (all so far), seconds (of this step; None
    for the first one of a process and the one behind a validation, a save or a skipped step), tokens_per_second,
    tflops_per_gpu (of model FLOPs, recomputation not counted), skipped; with a peak mfu, peak_tflops and peak_name; at
    each ``--log-interval`` peak_memory_bytes (largest of all ranks so far: torch's allocator on CUDA) or, on the CPU
    engine, peak_resident_bytes (the whole process). Or iteration, validation_loss, validation (name).

    A step's time ends before it is logged, and samples of packed documents are counted whole.

    The log's line has the mean over the interval's steps whose time is known, as have TensorBoard's tokens-per-second,
    tflops-per-gpu and mfu; TFLOP/s are left out of it under ``--log-throughput``, whose line of upstream has them.

    Args:
        path: The file; None writes none.
        flops: Batch size in samples to the training FLOPs of one step on all ranks.
        peak: Of one GPU.
        measure: Called by every rank at each ``--log-interval`` with the model's chunks on this rank. What it returns
            joins the record and is printed.
    """
    from megatron.training import training

    metrics = _Metrics(path, flops, peak, measure)
    training.train = metrics.keeping_the_model(training.train)
    training.training_log = metrics.recording_steps(training.training_log)
    for name in ("save_checkpoint_and_time", "dummy_train_step"):  # no step; nor is one of --iterations-to-skip
        setattr(training, name, metrics.stopping_the_clock(getattr(training, name)))
    training.evaluate_and_print_results = metrics.recording_validations(training.evaluate_and_print_results)


@dataclass(frozen=True)
class _Work:
    """Work of some steps and the time it took; of a step's own time None where something else stands in it."""

    tokens: int
    flops: float
    seconds: float | None

    def rates(self, ranks: int, peak: Peak | None) -> dict[str, float | None]:
        """tokens_per_second of all ranks; of each, tflops_per_gpu and with a peak mfu."""
        if not self.seconds:
            found: dict[str, float | None] = {"tokens_per_second": None, "tflops_per_gpu": None}
            return {**found, "mfu": None} if peak else found
        tflops = self.flops / self.seconds / ranks / 1e12
        found = {"tokens_per_second": self.tokens / self.seconds, "tflops_per_gpu": tflops}
        return {**found, "mfu": tflops / peak.tflops} if peak else found


class _Metrics:
    """The state that the hooks share. Each hook takes the function that it stands in for and returns its own."""

    def __init__(self, path: Path | None, flops: Callable[[int], float], peak: Peak | None, measure: Measure | None):
        self._path, self._flops, self._peak, self._measure = path, flops, peak, measure
        self._model: list = []
        self._last: float | None = None
        """When the last step was done, if nothing but a step has run since."""
        self._steps: list[_Work] = []
        """Of this interval, those whose time is known."""

    # Hooks ---------------------------------------------------------------------------------------

    def keeping_the_model(self, train: Callable) -> Callable:
        def kept(forward_step: Any, model: list, *args: Any, **kwargs: Any) -> Any:
            self._model = model
            return train(forward_step, model, *args, **kwargs)

        return kept

    def recording_steps(self, log: Callable) -> Callable:
        def recorded(loss_dict: dict, total: dict, rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            work = self._work()
            # the positional order of training_log: loss_scale, report_memory_flag, skipped_iter, grad_norm
            self._append(self._record(work, loss_dict, rate, iteration, skipped=args[2], grad_norm=args[3]))
            result = log(loss_dict, total, rate, iteration, *args, **kwargs)
            self._last = time.perf_counter()
            return result

        return recorded

    def stopping_the_clock(self, other: Callable) -> Callable:
        def stopped(*args: Any, **kwargs: Any) -> Any:
            self._last = None  # the next step's time would contain it
            return other(*args, **kwargs)

        return stopped

    def recording_validations(self, evaluate_and_print: Callable) -> Callable:
        from megatron.training import training

        def recorded(prefix: str, step: Any, data: Any, model: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
            evaluate, found = training.evaluate, 0

            def one_set(*eval_args: Any, **eval_kwargs: Any) -> Any:
                nonlocal found
                losses, other, timelimit = evaluate(*eval_args, **eval_kwargs)
                if not timelimit and losses:
                    value = _number(losses.get("lm loss"))
                    name = _validation(prefix, found)
                    self._append({"iteration": iteration, "validation_loss": value, "validation": name})
                found += 1
                return losses, other, timelimit

            training.evaluate = one_set
            try:
                evaluate_and_print(prefix, step, data, model, iteration, *args, **kwargs)
            finally:
                training.evaluate = evaluate
            self._last = None  # the next step's time would contain the validation

        return recorded

    # What they record ----------------------------------------------------------------------------

    def _work(self) -> _Work:
        """Of the step that has just been done, with the batch that upstream counts (training/training.py:2661)."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training.global_vars import get_args

        args = get_args()
        replicas = args.data_parallel_size * args.gtp_weight_remat_size
        samples = args.micro_batch_size * replicas * get_num_microbatches()
        seconds = None if self._last is None else time.perf_counter() - self._last
        return _Work(samples * args.seq_length, self._flops(samples), seconds)

    def _record(
        self, work: _Work, losses: dict, rate: Any, iteration: int, skipped: Any, grad_norm: Any
    ) -> dict[str, Any]:
        from megatron.training.global_vars import get_args

        args = get_args()
        values = {name: _number(value) for name, value in losses.items()}
        return {
            "iteration": iteration,
            "loss": values.pop("lm loss", None),
            **values,
            "learning_rate": _number(rate),
            "grad_norm": _number(grad_norm),
            "samples": args.consumed_train_samples,
            "tokens": args.consumed_train_samples * args.seq_length,
            "seconds": work.seconds,
            **work.rates(args.world_size, self._peak),
            **({"peak_tflops": self._peak.tflops, "peak_name": self._peak.name} if self._peak else {}),
            "skipped": bool(skipped),
            **self._at_interval(work, iteration),
        }

    def _at_interval(self, work: _Work, iteration: int) -> dict[str, Any]:
        """Memory, and what ``measure`` finds, which are said too; nothing between intervals."""
        from megatron.training.global_vars import get_args

        if work.seconds is not None:
            self._steps.append(work)
        if iteration % get_args().log_interval:
            return {}
        memory = _peak_memory()
        self._say_throughput(memory, iteration)
        found = self._measure(self._model) if self._measure else {}
        for name, values in found.items():
            if values:
                _say(f" {name}: " + " | ".join(f"{key} {value:.4f}" for key, value in values.items()))
                _plot({f"{name}/{key}": value for key, value in values.items()}, iteration)
        return {**memory, **found}

    def _say_throughput(self, memory: dict[str, int], iteration: int) -> None:
        from megatron.training.global_vars import get_args

        args, steps = get_args(), self._steps
        self._steps = []
        whole = _Work(sum(s.tokens for s in steps), sum(s.flops for s in steps), sum(s.seconds or 0 for s in steps))
        rates = {name: rate for name, rate in whole.rates(args.world_size, self._peak).items() if rate is not None}
        parts = []
        if rates:
            parts.append(f"tokens/s: {rates['tokens_per_second']:,.0f}")
            if not args.log_throughput:
                parts.append(f"TFLOP/s per {'GPU' if args.device == 'cuda' else 'process'}: {_short(rates)}")
            if self._peak:
                parts.append(f"MFU {100 * rates['mfu']:.1f}% of {self._peak.tflops:g} ({self._peak.name})")
        parts += [f"{_MEMORY[name]}: {size / 2**30:.1f} GiB" for name, size in memory.items()]
        _say(" " + " | ".join(parts))
        _plot({name.replace("_", "-"): value for name, value in {**rates, **memory}.items()}, iteration)

    def _append(self, record: dict[str, Any]) -> None:
        from megatron.training.utils import is_last_rank

        if self._path and is_last_rank():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


_MEMORY = {"peak_memory_bytes": "peak memory", "peak_resident_bytes": "peak resident memory"}


def _peak_memory() -> dict[str, int]:
    """The largest peak of all ranks since they began; every rank takes part."""
    import torch
    from megatron.training.global_vars import get_args

    if get_args().device == "cuda":
        name, size = "peak_memory_bytes", torch.cuda.max_memory_allocated()
    else:  # in KiB (Linux)
        name, size = "peak_resident_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(size, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return {name: int(largest)}


def _say(line: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(line)


def _plot(values: dict[str, float], iteration: int) -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)


def _short(rates: dict[str, float]) -> str:
    tflops = rates["tflops_per_gpu"]
    return f"{tflops:.1f}" if tflops >= 10 else f"{tflops:.3g}"


def _validation(prefix: str, index: int) -> str:
    split = "test" if "test set" in prefix else "validation"
    return split if index == 0 else f"{split}-{index}"


def _number(value: Any) -> float | None:
    if value is None:
        return None
    return float(value.item() if hasattr(value, "item") else value)
