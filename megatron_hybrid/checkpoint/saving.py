"""Saving checkpoints: with a manifest, in the background if asked for, and without the old ones that are not kept.

Upstream writes and finalises them (training/checkpointing.py:552); the hooks here wrap that.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_hybrid.argv import value
from megatron_hybrid.patches import child_processes
from megatron_hybrid.patches.hooks import Wrapper
from megatron_hybrid.patches.upstream import has_module
from megatron_hybrid.run_folder.checkpoints import is_sealed, remove, remove_old, seal, sweep

FORMAT = "torch_dist"


def saving_flags(argv: list[str], device: str) -> list[str]:
    """Upstream's flags without which checkpoints have no manifest, and ``--async-save`` is silently off.

    And without which the distributed optimizer's state loads in no other layout, or in fp32 not at all
    (:func:`.optimizer_checks.check_optimizer_state`). Local checkpoints refuse it (training/checkpointing.py:914).

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


def guard_saves(args: Namespace) -> dict[str, Wrapper]:
    """Seals checkpoints, removes old ones and explains failures of upstream's saves; before Megatron is initialised.

    By hooks in ``save_checkpoint`` and ``maybe_finalize_async_save`` as training/training.py calls them, and in
    ``schedule_async_save`` as training/checkpointing.py does. The manifest of
    ``--verify-integrity`` is ours, to the byte that of core/dist_checkpointing/validation.py:540, hashed on threads and
    brought to disk before the pointer is.

    Returns:
        Hooks of the run (:func:`megatron_hybrid.patches.hooks.install_hooks`).
    """
    guard = _Guard(args)
    if args.async_save and args.device == "cpu":
        save_from_a_copy_of_the_process(args)
    elif args.async_save and args.async_strategy == "mcore":
        child_processes.spawn_the_worker()
        child_processes.notice_a_dead_worker()
    return {
        "seal": lambda there: lambda folder: seal(Path(folder)),
        "guard_save": guard.around_a_save,
        "explain_failure": guard.explaining,
        "remove_old_checkpoints": guard.removing_old_ones_later,
    }


def save_from_a_copy_of_the_process(args: Namespace) -> None:
    """Background saves of the CPU engine: a forked child writes what memory held at that moment.

    Upstream's persistent worker gets tensors of the CPU as shared memory that training goes on changing; its other
    way (core/dist_checkpointing/strategies/async_utils.py, ``TemporalAsyncCaller``) forks, and needs no copy.
    """
    args.use_persistent_ckpt_worker = False


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
            self._begun = [*self._incomplete(), self._folder]
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
        """The same, with one line in front of the traceback if it fails: what was not saved, and why."""
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        def explained(*args: Any, **kwargs: Any) -> Any:
            try:
                return action(*args, **kwargs)
            except (OSError, RuntimeError, AssertionError, CheckpointException, CheckpointingException) as error:
                names = ", ".join(str(folder) for folder in self._incomplete()) or self._args.save
                _say(f"error: rank {self._args.rank}: {names}: not saved: {_reason(error)}. {self._room()}")
                self._remove_incomplete()
                raise

        return explained

    def _has_been_loaded(self) -> bool:
        """Whether the run has this very state from that very folder: no step has been done since.

        To write over the only valid checkpoint would put it at risk for nothing.
        """
        loaded = self._args.checkpoint
        if loaded is None or Path(loaded).absolute() != self._folder.absolute() or not is_sealed(self._folder):
            return False
        if self._args.rank == 0:
            print(f"{self._folder} is not saved again: the run has loaded it and done no step since.", flush=True)
        return True

    def _clear(self) -> None:
        """Removes what an interrupted save, or the run before a roll back, has left in the folder.

        Files of more ranks than there are now would stay, and an old manifest would list new files.
        """
        import torch

        if self._args.rank == 0:
            sweep(Path(self._args.save))
            if self._folder.is_dir() and not self._folder.is_symlink():
                remove(self._folder)
        torch.distributed.barrier()

    def _incomplete(self) -> list[Path]:
        """Folders of saves that were begun, and are not sealed."""
        with suppress(OSError):
            return [folder for folder in self._begun if not is_sealed(folder)]
        return []

    def _remove_incomplete(self) -> None:
        """Frees the disk space of a save that has failed: logs and states need some, too. The run ends here."""
        if self._args.rank == 0:
            with suppress(OSError):
                for folder in self._incomplete():
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
