"""Gloo processes that are started once for each world size and run many cases.

Importing Megatron takes seconds; starting it for every case would take most of the suite's time.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CellType
from typing import Any

TIMEOUT_S = 400.0
"""Longest case on a busy machine; beyond it a collective is taken to hang."""


class Ranks:
    """``size`` processes with the CPU engine and one default process group over Gloo."""

    def __init__(self, size: int):
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._logs = Path(tempfile.mkdtemp(prefix=f"ranks{size}-"))

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """Calls ``function(**kwargs)`` on every rank.

        Args:
            function: A module-level function of an importable module.

        Returns:
            One result for each rank, in order.

        Raises:
            AssertionError: A rank failed or hung; the text holds the first failing rank's traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, kwargs))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(results) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, deadline - time.monotonic())
            if not ready:
                late = self._pipes.index(waiting[0])
                self.close()
                raise AssertionError(f"rank {late} of {self.size} did not end in {TIMEOUT_S} s: {self._log(late)}")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, value = True, f"it died: {self._log(rank)}"
                if failed:
                    self.close()  # the others may wait in a collective
                    raise AssertionError(f"rank {rank} of {self.size} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def close(self, politely: bool = False) -> None:
        """Ends the processes, and those that they started; the next :meth:`run` starts new ones."""
        for pipe in self._pipes if politely else []:
            pipe.send(None)
        for process in self._processes:
            process.join(10 if politely else 0)
            # checkpoint writers belong to the rank's process group and would outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        port = 0
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port, self._log_path(rank)))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            port = port or ours.recv()  # a port looked for here could be another's before rank 0 listens on it

    def _log_path(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.log"

    def _log(self, rank: int) -> str:
        return self._log_path(rank).read_text(errors="replace")[-3000:]


def _serve(pipe: Connection, rank: int, size: int, port: int, log: Path) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from tests.support import preload  # noqa: F401

    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0's store: who asks the environment for one joins it
    )
    read_help_once()
    _fork_queues_of_saves()
    # each case ends with a collection (release_groups), which would go through all that the imports have made: 0.3 s
    gc.freeze()
    cases = 0
    while True:
        try:
            request = pipe.recv()
        except EOFError:  # the test run was killed
            request = None
        if request is None:
            return
        function, kwargs = request
        cases += 1
        case_store = torch.distributed.PrefixStore(f"case {cases}", store)
        torch.distributed.init_process_group("gloo", store=case_store, rank=rank, world_size=size)
        _meet("connected", case_store, rank, size)
        try:
            answer = (False, function(**kwargs))
            _meet("done", case_store, rank, size)
        except BaseException:
            answer = (True, traceback.format_exc())
        sys.stdout.flush()
        release_groups()
        pipe.send(answer)


def _meet(name: str, store: Any, rank: int, size: int) -> None:
    """Waits for all ranks: one that ends a case early would close connections that another still makes or reads."""
    store.set(f"{name} {rank}", "")
    store.wait([f"{name} {r}" for r in range(size)], timedelta(seconds=TIMEOUT_S))


def read_help_once() -> None:
    """Keeps the texts of Megatron's --help, which it parses out of its sources for every command line.

    They take three quarters of the time in which a small model is built (training/argument_utils.py:233).
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def once(self: Any, described: type) -> dict[str, str]:
        if described not in known:
            known[described] = read(self, described)
        return known[described]

    ArgumentGroupFactory._get_field_docstrings = once


def _fork_queues_of_saves() -> None:
    """Forks the process that holds the results of a run's saves, which imports torch where it is spawned: 2 s a run.

    What spawned ones do on signals and when their rank ends is tested in processes that are no ranks.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    made = filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": made("fork")


def release_groups() -> None:
    """Destroys all process groups: Megatron makes dozens for a layout, and each holds threads while it lives."""
    import torch
    from megatron.core import mpu
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    mpu.destroy_model_parallel()
    for model in [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]:
        # its gradient hooks hold it through autograd's nodes, where Python's collector does not see the cycle
        for cell in [r for r in gc.get_referrers(model) if isinstance(r, CellType)]:
            cell.cell_contents = None
    model = None
    RotaryEmbedding.forward.cache_clear()  # its keys hold layers, and these their groups
    torch.distributed.destroy_process_group()
    gc.collect()
