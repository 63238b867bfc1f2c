"""Patches of the processes that a rank starts: which signals they get, when they end, and who notices that."""

import os
import signal
from collections.abc import Callable
from queue import Empty
from typing import Any

from megatron_hybrid import die_with_parent
from megatron_hybrid.patches.patching import Patch, Table, install


def _spawn_without_sigterm(launch: Callable) -> Callable:
    def launched(path: Any, args: list, passfds: Any) -> int:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # Python's tracker of shared memory cleans up behind a process that was killed, and then ends by itself
        if not any("resource_tracker" in str(arg) for arg in args):
            args = [path, "-I", die_with_parent.__file__, str(os.getpid()), *args]
        try:
            return launch(path, args, passfds)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return launched


def _spawn_worker(start: Callable) -> Callable:
    def spawned(rank: int, mp_mode: str) -> None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        get_write_results_queue("spawn")  # upstream asks for it again, and gets this one
        start(rank, "spawn")

    return spawned


def _notice_death(is_done: Callable) -> Callable:
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

    return is_current_async_call_done


_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
SIGTERM = Table(
    "SIGTERM in children",
    (
        Patch(
            "multiprocessing.util",
            "spawnv_passfds",
            _spawn_without_sigterm,
            "SLURM signals every process of a step, and a save needs the children",
            "core/dist_checkpointing/strategies/filesystem_async.py:53",
            contract="block_sigterm_in_children",
        ),
    ),
    of_run=True,
)
SPAWNED_WORKER = Table(
    "spawned worker",
    (
        Patch(
            "megatron.training.initialize",
            "init_persistent_async_worker",
            _spawn_worker,
            "only spawned processes block SIGTERM and end with their rank",
            "training/initialize.py:74",
            contract="spawn_the_worker",
        ),
    ),
    of_run=True,
)
DEAD_WORKER = Table(
    "dead worker",
    (
        Patch(
            f"{_STRATEGIES}.async_utils:PersistentAsyncCaller",
            "is_current_async_call_done",
            _notice_death,
            "a rank waits for ever for a worker that has died",
            "core/dist_checkpointing/strategies/async_utils.py:437",
            contract="notice_a_dead_worker",
        ),
    ),
    of_run=True,
)


def block_sigterm_in_children() -> None:
    """Child processes that this one spawns from now on never get SIGTERM, and end when this one ends.

    SLURM signals every process of a step. A rank saves upon it, through a queue that lives in a process of its own
    (core/dist_checkpointing/strategies/filesystem_async.py:53) or by a worker
    (core/dist_checkpointing/strategies/async_utils.py:367): without them every save on a signal would fail. They start
    with it blocked. The queue's process would also outlive a rank that is killed.
    """
    install(SIGTERM)


def spawn_the_worker() -> None:
    """Both processes of background saves on GPUs are spawned, as those of other saves are.

    Upstream gets the worker from a fork server (training/initialize.py:74) and forks the one that holds the queue of
    results (training/async_utils.py:104). :func:`block_sigterm_in_children` concerns spawned ones alone: the two would
    outlive a rank that is killed, with its memory on the GPU, and the second would die of the signal to save.
    """
    install(SPAWNED_WORKER)


def notice_a_dead_worker() -> None:
    """Ends this rank when the process that saves in the background has died, for lack of memory as a rule.

    Upstream would wait for it for ever at the next save or the end, and save nothing until then
    (core/dist_checkpointing/strategies/async_utils.py, ``PersistentAsyncCaller.is_current_async_call_done``).
    """
    install(DEAD_WORKER)
