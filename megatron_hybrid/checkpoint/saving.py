"""Checkpoints as a run saves them: sealed with a manifest, in the background if asked for, old ones removed.

Upstream writes and finalises them (training/checkpointing.py:552); what is added here stands around that.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_hybrid.argv import value
from megatron_hybrid.patches.upstream import has_module
from megatron_hybrid.run_folder.checkpoints import is_sealed, remove, remove_old, seal, sweep

FORMAT = "torch_dist"


def saving_flags(argv: list[str], device: str) -> list[str]:
    """Upstream's flags without which checkpoints have no manifest, and ``--async-save`` is silently off.

    And without which the distributed optimizer's state loads in no other layout, or in fp32 not at all
    (:func:`.optimizer_state.check_optimizer_state`). Local checkpoints refuse that one (training/checkpointing.py:914).

    Raises:
        ValueError: Another way of saving in the background is asked for than there is.
    """
    added = ["--verify-integrity"] if value(argv, "--ckpt-format", FORMAT) == FORMAT else []
    if value(argv, "--non-persistent-ckpt-type", "") != "local":
        added.append("--dist-ckpt-optim-fully-reshardable")
    if "--async-save" not in argv:
        return added
    strategy = value(argv, "--async-strategy", "mcore")
    if strategy == "nvrx" and (device == "cpu" or not has_module("nvidia_resiliency_ext")):
        reason = "it saves from GPUs" if device == "cpu" else "its package, nvidia-resiliency-ext, is not installed"
        raise ValueError(f"--async-strategy nvrx: {reason}. Drop the flag: mcore saves in the background without it.")
    return [*added, "--use-persistent-ckpt-worker", "--async-strategy", strategy]


def check(args: Namespace, asked_async: bool) -> None:
    """Refuses retention that means nothing, and background saves that upstream has switched off.

    Args:
        args: Validated by upstream.
        asked_async: Whether the user has given ``--async-save``.

    Raises:
        ValueError: With the flag and what to give.
    """
    if asked_async and not (args.async_save and args.ckpt_format == FORMAT):
        raise ValueError(
            f"--async-save does nothing with --ckpt-format {args.ckpt_format}: training would wait for each save. Use "
            f"--ckpt-format {FORMAT}, or drop --async-save."
        )
    for flag, number in (("--keep-last", args.keep_last), ("--keep-every", args.keep_every)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: keep at least 1, or drop the flag to keep all checkpoints.")
    if args.keep_every is not None and args.keep_last is None:
        raise ValueError(
            f"--keep-every {args.keep_every} without --keep-last: all checkpoints are kept. Give --keep-last N, too."
        )
    if args.keep_every is not None and args.save_interval and args.keep_every % args.save_interval:
        raise ValueError(
            f"--keep-every {args.keep_every} is no multiple of --save-interval {args.save_interval}: the run hardly "
            "ever saves such an iteration. Give a multiple."
        )
    if args.save_retain_interval is not None:
        raise ValueError(
            f"--save-retain-interval {args.save_retain_interval} removes checkpoints without looking at the new one: "
            f"use --keep-last 1 --keep-every {args.save_retain_interval}."
        )
    if args.keep_last is not None and args.ckpt_format != FORMAT:
        raise ValueError(f"--keep-last needs --ckpt-format {FORMAT}, whose checkpoints have a manifest.")


def guard_saves(args: Namespace) -> None:
    """Puts seal, retention and plain words around upstream's saves; before Megatron is initialised.

    Wraps ``save_checkpoint`` and ``maybe_finalize_async_save`` as training/training.py calls them, and
    ``schedule_async_save`` (training/async_utils.py:109) as training/checkpointing.py does. The manifest of
    ``--verify-integrity`` is ours, to the byte that of core/dist_checkpointing/validation.py:540, hashed on threads and
    brought to disk before the pointer is.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.training import checkpointing, training

    guard = _Guard(args)
    serialization.save_integrity_manifest = lambda folder: seal(Path(folder))
    training.save_checkpoint = guard.around_a_save(training.save_checkpoint)
    training.maybe_finalize_async_save = guard.explaining(training.maybe_finalize_async_save)
    checkpointing.schedule_async_save = guard.removing_old_ones_later(checkpointing.schedule_async_save)
    if args.async_save and args.device == "cpu":
        save_from_a_copy_of_the_process(args)
    elif args.async_save and args.async_strategy == "mcore":
        spawn_the_worker()
        notice_a_dead_worker()


def save_from_a_copy_of_the_process(args: Namespace) -> None:
    """Background saves of the CPU engine: a forked child writes what memory held at that moment.

    Upstream's persistent worker gets tensors of the CPU as shared memory that training goes on changing; its other
    way (core/dist_checkpointing/strategies/async_utils.py, ``TemporalAsyncCaller``) forks, and needs no copy.
    """
    args.use_persistent_ckpt_worker = False


def spawn_the_worker() -> None:
    """Both processes of background saves on GPUs are spawned, as those of other saves are.

    Upstream gets the worker from a fork server (training/initialize.py:74) and forks the one that holds the queue of
    results (training/async_utils.py:104). ``ending.spare_helpers_the_signal`` reaches spawned ones alone: the two would
    outlive a rank that is killed, with its memory on the GPU, and the second would die of the signal to save.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
    from megatron.training import initialize

    start = initialize.init_persistent_async_worker

    def spawned(rank: int, mp_mode: str) -> None:
        get_write_results_queue("spawn")  # upstream asks for it again, and gets this one
        start(rank, "spawn")

    initialize.init_persistent_async_worker = spawned


def notice_a_dead_worker() -> None:
    """Ends this rank when the process that saves in the background has died, for lack of memory as a rule.

    Upstream would wait for it for ever at the next save or the end, and save nothing until then
    (core/dist_checkpointing/strategies/async_utils.py, ``PersistentAsyncCaller.is_current_async_call_done``).
    """
    from queue import Empty

    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    is_done = PersistentAsyncCaller.is_current_async_call_done

    def is_current_async_call_done(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while self.process and self.cur_item is None:
            try:
                self.cur_item = self._persistent_comp_q.get(timeout=0.1 if blocking else 0)
            except Empty:
                if not self.process.is_alive():
                    raise RuntimeError(
                        f"the process that saves checkpoints died (exit code {self.process.exitcode})"
                    ) from None
                if not blocking:
                    break
        return is_done(self, blocking, no_dist)

    PersistentAsyncCaller.is_current_async_call_done = is_current_async_call_done


class _Guard:
    """What the hooks share on this rank."""

    def __init__(self, args: Namespace):
        self._args = args
        self._folder = Path()
        """Of the save that was begun last."""
        self._begun: list[Path] = []
        """Of all saves that were begun; with --async-save the one before may still be on its way."""
        self._last: int | None = None
        """The iteration that this process has saved, or begun to save, last."""

    def around_a_save(self, save_checkpoint: Callable) -> Callable:
        def saved(iteration: int, *rest: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> Any:
            if non_persistent_ckpt or self._args.ckpt_format != FORMAT:
                return save_checkpoint(iteration, *rest, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
            if iteration == self._last:  # upstream saves once more where the batch grows (training/training.py:3761)
                return None
            self._folder = Path(self._args.save, f"iter_{iteration:07d}")
            if self._has_been_loaded():
                return None
            self._clear()
            self._last = iteration
            self._begun = [*self._torn(), self._folder]
            result = self.explaining(save_checkpoint)(iteration, *rest, **kwargs)
            if not self._args.async_save:
                self._remove_old(self._folder)
            return result

        return saved

    def removing_old_ones_later(self, schedule: Callable) -> Callable:
        def scheduled(request: Any) -> None:
            folder = self._folder
            request.add_finalize_fn(lambda: self._remove_old(folder))
            schedule(request)

        return scheduled

    def explaining(self, action: Callable) -> Callable:
        """The same, with plain words in front of the trace if it fails."""
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        def explained(*args: Any, **kwargs: Any) -> Any:
            try:
                return action(*args, **kwargs)
            except (OSError, RuntimeError, AssertionError, CheckpointException, CheckpointingException) as error:
                names = ", ".join(str(folder) for folder in self._torn()) or self._args.save
                _say(f"error: rank {self._args.rank}: {names}: not saved: {_reason(error)}. {self._room()}")
                self._remove_what_is_torn()
                raise

        return explained

    def _has_been_loaded(self) -> bool:
        """Whether the run has this very state from that very folder: no step has been done since.

        To write over the only whole checkpoint would put it at risk for nothing.
        """
        loaded = self._args.checkpoint
        if loaded is None or Path(loaded).absolute() != self._folder.absolute() or not is_sealed(self._folder):
            return False
        if self._args.rank == 0:
            print(f"{self._folder} is not saved again: the run has loaded it and done no step since.", flush=True)
        return True

    def _clear(self) -> None:
        """Removes what an interrupted save, or the run before a roll back, has left in the folder.

        Files of more ranks than there are now would stay for ever, and an old manifest would speak of new files.
        """
        import torch

        if self._args.rank == 0:
            sweep(Path(self._args.save))
            if self._folder.is_dir() and not self._folder.is_symlink():
                remove(self._folder)
        torch.distributed.barrier()

    def _torn(self) -> list[Path]:
        """Folders of saves that were begun, and are not sealed."""
        with suppress(OSError):
            return [folder for folder in self._begun if not is_sealed(folder)]
        return []

    def _remove_what_is_torn(self) -> None:
        """Gives back the room of a save that has failed: logs and states need some, too. The run ends here."""
        if self._args.rank == 0:
            with suppress(OSError):
                for folder in self._torn():
                    remove(folder)

    def _remove_old(self, folder: Path) -> None:
        """What retention does not keep; on rank 0, when the new checkpoint is sealed and the pointer leads to it."""
        args = self._args
        if args.rank != 0 or args.keep_last is None:
            return
        try:
            for gone in remove_old(Path(args.save), args.keep_last, args.keep_every, folder):
                print(f"removed {gone} (--keep-last {args.keep_last})", flush=True)
        except OSError as error:  # of a folder that cannot be renamed: training is worth more
            _say(f"WARNING: old checkpoints in {args.save} could not be removed: {error}")

    def _room(self) -> str:
        try:
            free = shutil.disk_usage(self._args.save).free
        except OSError as error:
            return f"{self._args.save} cannot be read: {error.strerror}."
        return f"{free / 1e9:,.2f} GB are free there. Checkpoints that were there before are as they were."


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no more is known'}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
