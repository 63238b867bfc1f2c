"""Steps whose loss or gradient norm is not finite, or whose loss jumps: stop or skip, and keep which samples they had.

docs/faults.md ("Bad steps") says what a user sees, and what Megatron's rerun machine does for hybrids.
"""

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FILE = "bad_batches.jsonl"
REPEATED, DIFFERED = 16, 17
"""Exit codes: a second try gave the same, or something else; 17 also where there was no second try."""


def watch_steps(run: Path | None, args: Namespace) -> None:
    """Stops at bad steps or skips them (``--on-bad-step``); before Megatron is initialised.

    Wraps ``train_step`` (training/training.py:2336), and on its first call ``step_with_ready_grads``
    (core/optimizer/optimizer.py:1738), which upstream calls when it knows the gradient norm. Its result says whether
    the weights were updated: without it upstream counts the iteration as skipped and leaves the schedule as it is.

    Under ``skip`` upstream's rerun machine is off (core/rerun_state_machine.py:486): all is decided before the
    update, by one reduction of two numbers over all ranks. Under ``stop`` the machine does the step again in place
    (core/rerun_state_machine.py:342). Upstream would then save a checkpoint with the machine's state, which on the same
    device is left by no restart, as it is never taken for a check (:679): here nothing is saved.

    Args:
        run: The folder for bad_batches.jsonl; None writes none.
        args: Megatron's global arguments.
    """
    from megatron.training import training

    global _watch
    _watch = _Watch(run, args)
    if args.on_bad_step == "skip":
        args.rerun_mode, args.check_for_nan_in_loss_and_grad = "disabled", False
    training.train_step = _watch.watching(training.train_step)


def check_loss(loss: Any) -> None:
    """Takes note of a micro-batch's loss; under ``stop`` Megatron's rerun machine checks it, too.

    The machine finds NaN and infinity under ``--check-for-nan-in-loss-and-grad`` and spikes under
    ``--check-for-spiky-loss`` (core/rerun_state_machine.py, ``validate_result``, ``is_unexpectedly_large``).

    Args:
        loss: Mean over the tokens of the micro-batch, on ranks of the last pipeline stage.
    """
    import torch
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training.global_vars import get_args

    args, machine = get_args(), get_rerun_state_machine()
    loss = loss.detach()
    if _watch is not None:
        _watch.losses.append(loss)
        if args.on_bad_step == "skip" or not torch.is_grad_enabled():
            return
    if args.check_for_nan_in_loss_and_grad:
        for found, name in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            machine.validate_result(loss, found, f"found {name} in the loss", tolerance=0.0, fatal=True)
    # outside of training the machine is disabled, and counts what it is shown all the same
    if args.check_for_spiky_loss and machine.get_mode() != RerunMode.DISABLED:
        machine.validate_result(loss, partial(is_spike, args), SPIKE, tolerance=0.0, fatal=True)


SPIKE = "found a spike in the loss"


def is_spike(args: Namespace, loss: Any) -> bool:
    """Whether a loss is ``--spike-threshold`` times the largest of this process's first 100 micro-batches."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    return get_rerun_state_machine().is_unexpectedly_large(loss, threshold=args.spike_threshold, context="loss")


def keep_training_set(sets: Any) -> Any:
    """Remembers the first of (training, validation, test) sets, to look up documents; returns what it is given."""
    if _watch is not None:
        _watch.training_set = sets[0]
    return sets


def sample_indices(consumed: int, micro_batch: int, size: int, rank: int, ranks: int) -> list[int]:
    """Indices of a micro-batch's samples in the order of training (training/datasets/data_samplers.py:122).

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

    Returns:
        data_set (its path without suffix) and documents (their indices in it, in the order in which the sample has
        them; the last one may give it no more than the label of its last token); None where it cannot be told.
    """
    try:
        if hasattr(training_set, "datasets"):  # a blend (core/datasets/blended_dataset.py:98)
            training_set[index]  # loads the indices on first use
            part, inner = training_set.dataset_index[index], training_set.dataset_sample_index[index]
            return documents(training_set.datasets[part], int(inner))
        found = training_set._query_document_sample_shuffle_indices(index)[1]
        return {"data_set": str(training_set.dataset_path), "documents": [int(i) for i in found]}
    except Exception:  # of a data set that is not as we know it: a note on a bad batch must not end the run
        return None


class _Watch:
    """What the hooks share on this rank."""

    def __init__(self, run: Path | None, args: Namespace):
        self._run, self._args = run, args
        self._skips = args.on_bad_step == "skip"
        self._checks_finite = self._skips or args.check_for_nan_in_loss_and_grad
        self.losses: list[Any] = []
        """Of this step's micro-batches; a second try of the step adds its own."""
        self.training_set: Any = None
        self._in_a_row = 0
        self._stop: int | None = None
        """Exit code, once the run is to stop."""
        self._buffers: list[tuple[Any, Any]] = []
        self._norm: Any = 0.0
        self._first = True

    # Hooks ---------------------------------------------------------------------------------------

    def watching(self, train_step: Callable) -> Callable:
        def watched(forward: Any, data: Any, model: list, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self._first:
                self._hook(model, optimizer)
            self.losses = []
            if self._skips:
                self._keep_buffers()
            result = train_step(forward, data, model, optimizer, *args, **kwargs)
            self._first = False
            if result[3] and result[4] in (REPEATED, DIFFERED):  # should_exit, exit_code
                self._stop = result[4]
                _say_once(_STOPPED[result[4]])
            if self._stop is None:
                return result
            return {}, True, False, True, self._stop, None, None, 0

        return watched

    def _hook(self, model: list, optimizer: Any) -> None:
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        modules = [module for chunk in model for module in chunk.modules()]
        names = [(m, n) for m in modules for n, b in m._buffers.items() if b is not None]
        self._persistent = [m._buffers[n] for m, n in names if n not in m._non_persistent_buffers_set]
        norm, update, machine = optimizer.get_grad_norm, optimizer.step_with_ready_grads, get_rerun_state_machine()

        def get_grad_norm() -> Any:
            self._norm = norm()
            return self._norm

        def step_with_ready_grads() -> bool:
            # upstream's machine checks nothing in a process's first step
            if (self._skips or self._first) and self._is_bad():
                return False
            return update()

        optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
        self._also_keep_buffers(machine)
        log = machine._log_validation_error_to_file

        def recorded(status: Any, result: Any, message: str) -> None:
            in_loss = message.endswith("in the loss")
            micro_batch = (len(self.losses) - 1) % _micro_batches() if in_loss else None
            if not in_loss or _speaks_for_tensor_ranks():
                self._record(message, float(result), micro_batch, status.value)
            log(status=status, result=result, message=message)

        machine._log_validation_error_to_file = recorded

    def _also_keep_buffers(self, machine: Any) -> None:
        """The second try starts from what the first one changed beside gradients, such as MoE's expert bias.

        With it tokens go to other experts: upstream would take the other result for faulty hardware.
        """
        save, restore = machine.state_save_func, machine.state_restore_func

        def saved() -> dict[str, Any]:
            self._keep_buffers()
            return save()

        def restored(state: dict[str, Any]) -> None:
            self._restore_buffers()
            restore(state)

        machine.state_save_func, machine.state_restore_func = saved, restored

    def _keep_buffers(self) -> None:
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self._persistent]

    def _restore_buffers(self) -> None:
        for buffer, kept in self._buffers:
            buffer.data.copy_(kept)

    # The decision --------------------------------------------------------------------------------

    def _is_bad(self) -> bool:
        """Whether any rank has found this step to be bad; every rank takes part. Writes down what was found."""
        import torch

        found = self._bad_losses()
        norm = float(self._norm)
        bad_norm = self._checks_finite and not math.isfinite(norm)
        flags = torch.tensor([bool(found), bad_norm], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        in_loss, in_norm = flags.tolist()
        if not in_loss and not in_norm:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        skip = self._skips and self._in_a_row <= self._args.max_skipped_steps
        outcome = "skipped" if skip else "stopped"
        if _speaks_for_tensor_ranks():
            for micro_batch, message, value in found:
                self._record(message, value, micro_batch, outcome)
        if not in_loss and self._args.rank == self._args.world_size - 1:
            self._record(f"found {_name(norm)} in the gradient norm", norm, None, outcome, all_ranks=True)
        if self._skips:
            self._restore_buffers()
        if not skip:
            self._stop = DIFFERED
            _say_once(_TOO_MANY.format(self._in_a_row - 1) if self._skips else _FIRST)
        return True

    def _bad_losses(self) -> list[tuple[int, str, float]]:
        """Micro-batch, what is wrong with its loss, and the loss."""
        import torch

        if not self.losses:
            return []
        found = []
        for micro_batch, value in enumerate(torch.stack(self.losses).tolist()):
            if not math.isfinite(value):
                if self._checks_finite:
                    found.append((micro_batch, f"found {_name(value)} in the loss", value))
            elif self._skips and self._args.check_for_spiky_loss and is_spike(self._args, torch.tensor(value)):
                found.append((micro_batch, SPIKE, value))
        return found

    def _record(
        self, found: str, value: float, micro_batch: int | None, outcome: str, all_ranks: bool = False
    ) -> None:
        """Appends a line to bad_batches.jsonl and prints it: on the rank that has seen it, or for ``all_ranks``."""
        from megatron.core import mpu

        args = self._args
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        samples: list[int] | None = None
        if args.dataloader_type == "single":  # the others shuffle on their own
            which = range(_micro_batches()) if micro_batch is None else [micro_batch]
            places = [(m, r) for m in which for r in (range(ranks) if all_ranks else [rank])]
            consumed, size = args.consumed_train_samples, args.micro_batch_size
            samples = [i for m, r in places for i in sample_indices(consumed, m, size, r, ranks)]
        sources = [documents(self.training_set, i) for i in samples or []] if self.training_set is not None else []
        line = json.dumps(
            {
                "iteration": args.curr_iteration + 1,
                "found": found,
                "value": value if math.isfinite(value) else str(value),
                "outcome": outcome,
                "micro_batch": micro_batch,
                "data_parallel_rank": None if all_ranks else rank,
                "rank": args.rank,
                "samples": samples,
                "sources": sources,
            }
        )
        print(f"bad step: {line}", file=sys.stderr, flush=True)
        if self._run is not None:
            _append(self._run / FILE, line)


_watch: _Watch | None = None
_STOPPED = {
    REPEATED: "a second try of the step gave the same. Starting again from the last checkpoint will meet it again, unless "
    "this hardware is at fault: look at the samples, start on other nodes, or give --on-bad-step skip.",
    DIFFERED: "a second try of the step gave something else: this hardware may be at fault. Start again from the last "
    "checkpoint, on other nodes if it comes back.",
}
_FIRST = "it was the first step of this process, which is not tried again."
_TOO_MANY = "after {} skipped steps in a row (--max-skipped-steps). The weights or the data are at fault."


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity"


def _micro_batches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()


def _speaks_for_tensor_ranks() -> bool:
    """They have the same losses; the first has the data set, too."""
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_rank() == 0


def _say_once(why: str) -> None:
    from megatron.training.global_vars import get_args

    args = get_args()
    if args.rank == 0:
        text = f"error: iteration {args.curr_iteration + 1} is rejected and the run stops: {why} "
        text += f"What was found and in which samples: {FILE} in the --save folder. Nothing was saved."
        print(text, file=sys.stderr, flush=True)


def _append(path: Path, line: str) -> None:
    """One write of one line to the end, so that ranks can share the file. A full disk must not hide the finding."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{line}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)
