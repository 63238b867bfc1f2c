"""Steps whose loss or gradient is not finite, or whose loss jumps: stop or skip, and keep which samples they had.

docs/faults.md ("Bad steps") says what a user sees, and what Megatron's rerun machine does for hybrids.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid.patches.hooks import Wrapper, wrap_restore, wrap_update
from megatron_hybrid.run_folder.metrics_file import Appender

FILE = "bad_batches.jsonl"
REPEATED, STOPPED = 16, 17
"""Exit codes: a second try of the step gave the same; it gave something else, or there was none."""


def watch_steps(run: Path | None, args: Namespace, datasets: Callable) -> tuple[Callable, dict[str, Wrapper]]:
    """Stops at bad steps or skips them (``--on-bad-step``), and notes their samples; before Megatron is initialised.

    By a hook in ``train_step`` and in what it calls: the forward step, whose losses upstream leaves to the training
    script to check, and ``step_with_ready_grads`` of the optimizer (core/optimizer/optimizer.py:1738),
    which is called when the gradient norm is known. Its result says whether there was an update: without one upstream
    counts the iteration as skipped and leaves the schedule of the learning rate where it is.

    Before every update all ranks reduce two flags, a bad loss and a bad norm, and the step is skipped or ends the run.
    Under ``stop`` upstream's rerun machine comes before that: it does the step again in place
    (core/rerun_state_machine.py:335), except in the first step of a process (:594). Its exit code is taken, and not
    the checkpoint that it asks for: a restart from that one goes straight to the bad step, and on the same device
    ends there each time (:663).

    Under ``skip`` the machine is off. Where it is, upstream's own checks would raise (:519): they are off, too.

    Args:
        run: The folder for bad_batches.jsonl; None writes none.
        args: Megatron's global arguments, in which upstream's checks are switched.
        datasets: Provider of (training, validation, test) sets.

    Returns:
        The provider, whose training set is remembered, to look up documents; and hooks of the run.
    """
    watch = _Watch(run, args)
    if args.on_bad_step == "skip":
        args.rerun_mode = "disabled"
    if args.rerun_mode == "disabled":
        args.check_for_nan_in_loss_and_grad = False
    return watch.remembering(datasets), {"watch_step": watch.watching}


def sample_indices(consumed: int, micro_batch: int, size: int, rank: int, ranks: int) -> list[int]:
    """Indices of a micro-batch's samples in the training set (training/datasets/data_samplers.py:176).

    Args:
        consumed: Samples of all steps before this one.
        micro_batch: Of the step, from 0.
        size: Samples of a micro-batch on one rank.
        rank: Among ``ranks`` data-parallel ones.
    """
    start = consumed + (micro_batch * ranks + rank) * size
    return list(range(start, start + size))


def documents(training_set: Any, index: int) -> dict[str, Any] | None:
    """The data set and the documents behind a sample (core/datasets/gpt_dataset.py:353).

    Of a blend those of the part that the sample is from (core/datasets/blended_dataset.py:98).

    Returns:
        data_set (its path without suffix) and documents (their indices in it, in the order in which the sample has
        them; the last one may give it no more than the label of its last token); None where it cannot be told.
    """
    try:
        if hasattr(training_set, "datasets"):
            training_set[index]  # loads the indices on first use
            part, inner = training_set.dataset_index[index], training_set.dataset_sample_index[index]
            return documents(training_set.datasets[part], int(inner))
        found = training_set._query_document_sample_shuffle_indices(index)[1]
        return {"data_set": training_set.dataset_path, "documents": [int(i) for i in found]}
    except Exception:  # a set of another kind, or a broken one: a note on a bad batch must not change how the run ends
        return None


class _Loss(NamedTuple):
    mean: Any
    """Over the tokens of the micro-batch: fp32 of no dimensions."""
    is_spike: bool


class _Finding(NamedTuple):
    micro_batch: int
    found: str
    value: float


class _Watch:
    """What the hooks share on this rank."""

    def __init__(self, run: Path | None, args: Namespace):
        self._file = Appender(run / FILE) if run else None
        self._args = args
        self._skips = args.on_bad_step == "skip"
        self._finds_infinities = self._skips or args.check_for_nan_in_loss_and_grad
        self._losses: list[_Loss] = []
        """Of this step's micro-batches, in order; a second try of the step adds its own. Empty on earlier stages."""
        self._norm: Any = None
        """Of this step's gradient; None before it is known."""
        self._persistent: list[Any] | None = None
        """The buffers that checkpoints hold, such as MoE's expert bias, which upstream moves before the optimizer."""
        self._kept: list[Any] = []
        """Their values before this step."""
        self._training_set: Any = None
        self._in_a_row = 0
        """Bad steps so far, skipped ones and this one."""
        self._stop = False

    # Hooks ---------------------------------------------------------------------------------------

    def remembering(self, datasets: Callable) -> Callable:
        @wraps(datasets)
        def provided(*args: Any, **kwargs: Any) -> Any:
            sets = datasets(*args, **kwargs)
            if sets[0] is not None:  # it is None for chunks of the model that read nothing
                self._training_set = sets[0]
            return sets

        return provided

    def watching(self, train_step: Callable) -> Callable:
        def watched(forward: Callable, data: Any, model: list, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self._persistent is None:
                self._hook(model, optimizer)
            self._losses, self._norm = [], None
            self._kept = [buffer.detach().clone() for buffer in self._persistent or ()]
            result = train_step(self._noting_losses(forward), data, model, optimizer, *args, **kwargs)
            rejected, code = result[3:5]
            if rejected:
                self._find(self._losses[: _micro_batches()], "stopped", rejected=True)
                self._say(_REPEATED if code == REPEATED else _DIFFERED)
            elif self._stop:
                code = STOPPED
            else:
                return result
            # no losses, skipped, no checkpoint, exit, its code, and nothing of the gradient
            return {}, True, False, True, code, None, None, 0

        return watched

    def _noting_losses(self, forward: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            output, reduce = forward(*args, **kwargs)

            def reduced(output: Any) -> Any:
                total, tokens, log = reduce(output)
                self._check(total.detach() / tokens.clamp(min=1))
                return total, tokens, log

            return output, reduced

        return noted

    def _hook(self, model: list, optimizer: Any) -> None:
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        modules = [module for chunk in model for module in chunk.modules()]
        self._persistent = [
            buffer
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        if not self._args.optimizer_cuda_graph:  # nothing in a captured step can wait for a value
            wrap_update(optimizer, self._noting_the_norm, self._updating_if_good)
        wrap_restore(get_rerun_state_machine(), self._restoring_buffers)

    def _noting_the_norm(self, norm: Callable) -> Callable:
        def get_grad_norm() -> Any:
            self._norm = norm()
            return self._norm

        return get_grad_norm

    def _updating_if_good(self, update: Callable) -> Callable:
        return lambda: False if self._is_bad() else update()

    def _restoring_buffers(self, restore: Callable) -> Callable:
        def restored(state: dict[str, Any]) -> None:
            # with the first try's bias tokens go to other experts, and upstream would take the hardware to be faulty
            self._restore_buffers()
            restore(state)

        return restored

    def _restore_buffers(self) -> None:
        for buffer, kept in zip(self._persistent or (), self._kept, strict=True):
            buffer.data.copy_(kept)

    # The decision --------------------------------------------------------------------------------

    def _check(self, loss: Any) -> None:
        """Takes note of a micro-batch's mean loss, and hands it to upstream's machine unless that is off."""
        import torch
        from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

        args, machine = self._args, get_rerun_state_machine()
        is_spike = args.check_for_spiky_loss and machine.is_unexpectedly_large(loss, args.spike_threshold, "loss")
        self._losses.append(_Loss(loss, is_spike))
        if machine.get_mode() == RerunMode.DISABLED:
            return
        if self._finds_infinities:
            for found, name in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
                machine.validate_result(loss, found, f"found {name} in the loss")
        if args.check_for_spiky_loss:
            machine.validate_result(loss, lambda _: is_spike, _SPIKE)

    def _is_bad(self) -> bool:
        """Whether this step must make no update; every rank takes part. Writes down what was found."""
        if not self._finds_infinities and not self._args.check_for_spiky_loss:
            return False
        outcome = "skipped" if self._skips and self._in_a_row < self._args.max_skipped_steps else "stopped"
        if not self._find(self._losses[-_micro_batches() :], outcome):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._restore_buffers()
        if outcome == "stopped":
            self._stop = True
            self._say(_TOO_MANY.format(self._in_a_row - 1) if self._skips else _NO_SECOND_TRY)
        return True

    def _find(self, losses: list[_Loss], outcome: str, rejected: bool = False) -> bool:
        """Whether a loss or the gradient is bad on any rank; writes down which: bad losses, or else the gradient.

        Args:
            losses: Of one try of this step.
            outcome: What comes of it if it is bad.
            rejected: Upstream's machine has found it in a loss or in a gradient.
        """
        import torch
        from megatron.core import mpu

        found = self._bad_losses(losses)
        in_norm = self._finds_infinities and self._norm is not None and not math.isfinite(float(self._norm))
        flags = torch.tensor([bool(found), in_norm or rejected], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        in_loss, in_gradient = flags.tolist()
        if mpu.get_tensor_model_parallel_rank() == 0:  # the others have the same losses, and no data
            for finding in found:
                self._record(finding, outcome)
            first = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
            if in_gradient and not in_loss and first and mpu.is_pipeline_last_stage(ignore_virtual=True):
                self._record(None, outcome)
        return bool(in_loss or in_gradient)

    def _bad_losses(self, losses: list[_Loss]) -> list[_Finding]:
        import torch

        found = []
        values = torch.stack([loss.mean for loss in losses]).tolist() if losses else []
        for micro_batch, (value, loss) in enumerate(zip(values, losses, strict=True)):
            if self._finds_infinities and not math.isfinite(value):
                found.append(_Finding(micro_batch, f"found {_name(value)} in the loss", value))
            elif loss.is_spike:
                found.append(_Finding(micro_batch, _SPIKE, value))
        return found

    # What is written and said --------------------------------------------------------------------

    def _record(self, finding: _Finding | None, outcome: str) -> None:
        """A line of bad_batches.jsonl: on a loss of this rank, or (None) on the gradient of all samples of the step."""
        from megatron.core import mpu

        args = self._args
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        if finding is None:
            norm = None if self._norm is None else float(self._norm)
            found, value = f"found {'NaN or infinity' if norm is None else _name(norm)} in the gradient", norm
            places = [(m, r) for m in range(_micro_batches()) for r in range(ranks)]
        else:
            found, value = finding.found, finding.value
            places = [(finding.micro_batch, rank)]
        samples: list[int] | None = None
        if args.dataloader_type == "single":  # the others shuffle on their own
            consumed, size = args.consumed_train_samples, args.micro_batch_size
            samples = [i for m, r in places for i in sample_indices(consumed, m, size, r, ranks)]
        record = {
            "iteration": args.curr_iteration + 1,
            "found": found,
            "value": value if value is None or math.isfinite(value) else str(value),
            "outcome": outcome,
            "micro_batch": finding.micro_batch if finding else None,
            "data_parallel_rank": rank if finding else None,
            "rank": args.rank if finding else None,
            "samples": samples,
            "sources": None if samples is None else [documents(self._training_set, i) for i in samples],
        }
        where = f"micro-batch {finding.micro_batch} of rank {args.rank}" if finding else "the whole step"
        which = f"samples {samples[0]} to {samples[-1]}" if samples else "in an order of their own"
        _print(f"bad step: iteration {args.curr_iteration + 1} ({outcome}): {found}: {where}, {which}")
        if self._file and (warning := self._file.append(record)):
            _print(warning)

    def _say(self, why: str) -> None:
        if self._args.rank == 0:
            text = f"error: iteration {self._args.curr_iteration + 1} is rejected and the run stops: {why}"
            text += " No checkpoint was saved."
            text += f" What was found, and in which samples: {self._file.path}" if self._file else ""
            _print(text)


_SPIKE = "found a spike in the loss"
_REPEATED = (
    "a second try of the step gave the same. Starting again from the last checkpoint will meet it again, unless this "
    "hardware is at fault: look at the samples, leave the step out (--iterations-to-skip), or give --on-bad-step skip."
)
_DIFFERED = (
    "a second try of the step gave something else, so this hardware may be at fault. Start again from the last "
    "checkpoint; on other nodes if it comes back."
)
_NO_SECOND_TRY = "there is no second try in the first step of a process, nor under --rerun-mode disabled."
_TOO_MANY = "{} steps in a row have been skipped (--max-skipped-steps). The weights or the data are at fault."


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity"


def _micro_batches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()
