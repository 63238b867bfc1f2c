"""What a run measures of itself: metrics.jsonl, and a line on throughput and memory at each --log-interval."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.patches.hooks import Wrapper, wrap_evaluate
from megatron_hybrid.patches.routers import number_routers_of_heads
from megatron_hybrid.run_folder.metrics_file import Appender, balance
from megatron_hybrid.training.expert_loads import count_tokens_of_experts, expert_loads
from megatron_hybrid.training.throughput import MEMORY, Peak, Work, peak_memory, short

Measure = Callable[[list], dict[str, dict[str, float]]]
"""The model's chunks on this rank to values by name, in groups."""


def write_metrics(
    path: Path | None, flops: Callable[[int], float], peak: Peak | None, measure: Measure | None = None
) -> dict[str, Wrapper]:
    """Appends a JSON line for each start, training step and validation to ``path``; says the throughput in the log.

    By hooks in ``training_log``, which every rank calls at each step with that step's reduced values, and in
    ``evaluate_and_print_results``. The last rank writes, as upstream's own loggers do.
    :mod:`megatron_hybrid.run_folder.metrics_file` reads the file: after a resume an iteration may stand twice.

    Records, each with the time (seconds since 1970). Of a start: resume (the iteration that it goes on from), samples,
    tokens, checkpoint (None for fresh weights), processes, layout (sizes of tp, cp, ep, pp, dp), device, backend.
    Of a step: iteration, loss, learning_rate, grad_norm, samples, tokens (all so far), seconds (of this step; None
    for the first one of a process and the one behind a validation, a save or a skipped step), tokens_per_second,
    tflops_per_gpu (of model FLOPs, recomputation not counted), skipped; with a peak mfu, peak_tflops and peak_name; at
    each ``--log-interval`` peak_memory_bytes (largest of all ranks so far: torch's allocator on CUDA) or, on the CPU
    engine, peak_resident_bytes (the whole process), and expert_loads: layer to the share of tokens of each expert since
    the last interval (:func:`.expert_loads.expert_loads`). Of a validation: iteration, validation_loss, validation
    (its name).

    A step's time ends before it is logged, and samples of packed documents are counted whole.

    The log's line has the mean over the interval's steps whose time is known, as have tokens-per-second,
    tflops-per-gpu and mfu in TensorBoard and W&B; TFLOP/s are left out of it under ``--log-throughput``, whose line of
    upstream has them.

    Args:
        path: The file; None writes none.
        flops: Batch size in samples to the training FLOPs of one step on all ranks.
        peak: Of one GPU.
        measure: Called by every rank at each ``--log-interval`` with the model's chunks on this rank. What it returns
            joins the record and is printed.

    Returns:
        Hooks of the run (:func:`megatron_hybrid.patches.hooks.install_hooks`).
    """
    metrics = _Metrics(path, flops, peak, measure)
    return {
        "keep_model": metrics.keeping_the_model,
        "record_step": metrics.recording_steps,
        "stop_clock": metrics.stopping_the_clock,
        "record_validation": metrics.recording_validations,
    }


class _Metrics:
    """The state that the hooks share. Each hook takes the function that it stands in for and returns its own."""

    def __init__(self, path: Path | None, flops: Callable[[int], float], peak: Peak | None, measure: Measure | None):
        self._file = Appender(path) if path else None
        self._flops, self._peak, self._measure = flops, peak, measure
        self._model: list = []
        self._last: float | None = None
        """When the last step was done, if nothing but a step has run since."""
        self._steps: list[Work] = []
        """Of this interval, those whose time is known."""

    # Hooks ---------------------------------------------------------------------------------------

    def keeping_the_model(self, train: Callable) -> Callable:
        def kept(forward_step: Any, model: list, *args: Any, **kwargs: Any) -> Any:
            self._model = model
            count_tokens_of_experts(model)
            number_routers_of_heads(model)
            self._append(_start())
            return train(forward_step, model, *args, **kwargs)

        return kept

    def recording_steps(self, log: Callable) -> Callable:
        from megatron.training.global_vars import get_args

        def recorded(loss_dict: dict, total: dict, rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            work = self._work()
            # the positional order of training_log: loss_scale, report_memory_flag, skipped_iter, grad_norm
            self._append(self._record(work, loss_dict, rate, iteration, skipped=args[2], grad_norm=args[3]))
            if kwargs.get("is_first_iteration") and not iteration % get_args().log_interval:
                # upstream would keep this step's loss and add it to that of the next line (training/training.py:2590)
                kwargs["is_first_iteration"] = False
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
        def recorded(prefix: str, step: Any, data: Any, model: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
            found = 0

            def recording_sets(evaluate: Callable) -> Callable:
                def one_set(*eval_args: Any, **eval_kwargs: Any) -> Any:
                    nonlocal found
                    losses, other, timelimit = evaluate(*eval_args, **eval_kwargs)
                    if not timelimit and losses:
                        value = _number(losses.get("lm loss"))
                        name = _validation(prefix, found)
                        self._append({"iteration": iteration, "validation_loss": value, "validation": name})
                    found += 1
                    return losses, other, timelimit

                return one_set

            with wrap_evaluate(recording_sets):
                evaluate_and_print(prefix, step, data, model, iteration, *args, **kwargs)
            self._last = None  # the next step's time would contain the validation

        return recorded

    # What they record ----------------------------------------------------------------------------

    def _work(self) -> Work:
        """Of the step that has just been done, with the batch that upstream counts (training/training.py:2661)."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training.global_vars import get_args

        args = get_args()
        replicas = args.data_parallel_size * args.gtp_weight_remat_size
        samples = args.micro_batch_size * replicas * get_num_microbatches()
        seconds = None if self._last is None else time.perf_counter() - self._last
        return Work(samples * args.seq_length, self._flops(samples), seconds)

    def _record(
        self, work: Work, losses: dict, rate: Any, iteration: int, skipped: Any, grad_norm: Any
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

    def _at_interval(self, work: Work, iteration: int) -> dict[str, Any]:
        """Memory, and what ``measure`` finds, which are said too; nothing between intervals."""
        from megatron.training.global_vars import get_args

        if work.seconds is not None:
            self._steps.append(work)
        if iteration % get_args().log_interval:
            return {}
        memory = peak_memory()
        self._say_throughput(memory, iteration)
        found: dict[str, Any] = dict(self._measure(self._model)) if self._measure else {}
        for name, values in found.items():
            if values:
                _say(f" {name}: " + " | ".join(f"{key} {value:.4f}" for key, value in values.items()))
                _plot({f"{name}/{key}": value for key, value in values.items()}, iteration)
        loads = expert_loads(self._model)
        if loads:
            _say_balance(loads, iteration)
            # five digits: with many experts these are most of the file
            found["expert_loads"] = {layer: [float(f"{s:.5g}") for s in shares] for layer, shares in loads.items()}
        return {**memory, **found}

    def _say_throughput(self, memory: dict[str, int], iteration: int) -> None:
        from megatron.training.global_vars import get_args

        args, steps = get_args(), self._steps
        self._steps = []
        whole = Work(sum(s.tokens for s in steps), sum(s.flops for s in steps), sum(s.seconds or 0 for s in steps))
        rates = {name: rate for name, rate in whole.rates(args.world_size, self._peak).items() if rate is not None}
        parts = []
        if rates:
            parts.append(f"tokens/s: {rates['tokens_per_second']:,.0f}")
            if not args.log_throughput:
                parts.append(f"TFLOP/s per {'GPU' if args.device == 'cuda' else 'process'}: {short(rates)}")
            if self._peak:
                parts.append(f"MFU {100 * rates['mfu']:.1f}% of {self._peak.tflops:g} ({self._peak.name})")
        parts += [f"{MEMORY[name]}: {size / 2**30:.1f} GiB" for name, size in memory.items()]
        _say(" " + " | ".join(parts))
        _plot({name.replace("_", "-"): value for name, value in {**rates, **memory}.items()}, iteration)

    def _append(self, record: dict[str, Any]) -> None:
        from megatron.training.utils import is_last_rank

        if self._file and is_last_rank() and (warning := self._file.append(record)):
            _say(warning)


def _start() -> dict[str, Any]:
    """The record of a start: where it goes on, and with what."""
    from megatron.training.global_vars import get_args

    args = get_args()
    return {
        "resume": args.iteration,
        "samples": args.consumed_train_samples,
        "tokens": args.consumed_train_samples * args.seq_length,
        "checkpoint": args.checkpoint,
        "processes": args.world_size,
        "layout": {
            "tp": args.tensor_model_parallel_size,
            "cp": args.context_parallel_size,
            "ep": args.expert_model_parallel_size,
            "pp": args.pipeline_model_parallel_size,
            "dp": args.data_parallel_size,
        },
        "device": args.device,
        "backend": args.backend,
    }


def _say_balance(loads: dict[str, list[float]], iteration: int) -> None:
    """The most uneven layer of experts in the log, all of them in TensorBoard and W&B."""
    found = {layer: balance(shares) for layer, shares in loads.items()}
    worst = max(found, key=lambda layer: found[layer].max_over_mean)
    _say(
        f" busiest expert: {found[worst].max_over_mean:.2f} times the mean load, in layer {worst} "
        f"(mean over {len(found)} layers: {sum(b.max_over_mean for b in found.values()) / len(found):.2f})"
    )
    for name in ("max_over_mean", "entropy"):
        title = f"expert-load-{name.replace('_', '-')}"
        _plot({f"{title}/{layer}": getattr(b, name) for layer, b in found.items()}, iteration)


def _say(line: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(line)


def _plot(values: dict[str, float], iteration: int) -> None:
    """Into TensorBoard and W&B, whose writers are upstream's (training/global_vars.py)."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    if writer := get_tensorboard_writer():
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(values, iteration)


def _validation(prefix: str, index: int) -> str:
    split = "test" if "test set" in prefix else "validation"
    return split if index == 0 else f"{split}-{index}"


def _number(value: Any) -> float | None:
    if value is None:
        return None
    return float(value.item() if hasattr(value, "item") else value)
