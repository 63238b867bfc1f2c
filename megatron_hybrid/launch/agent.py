"""torchrun's agent of a node, with a grace period for saving, joint restarts, and the first failing rank and its cause.

torchrun (torch/distributed/run.py) is a command line around the same classes. What it lacks: upon SIGTERM it kills its
ranks after 30 s; it waits as long for ranks that hang because another has failed; it restarts after a mistake in the
flags as after a lost GPU; and it does not record which rank failed first.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatron_hybrid import die_with_parent
from megatron_hybrid.launch import events, rank
from megatron_hybrid.launch.requeue import FINAL_CODES
from megatron_hybrid.launch.tail import Tail

POLL_S = 0.1
LINGER_S = 2.0
"""How long the other ranks of the node may take to end by themselves after the first failure, so that their exceptions
reach their logs. They would hang in collectives for minutes."""
STRAGGLE_S = 10.0
"""The same during a stop, once a rank has failed: no save of all ranks can follow."""
UNKILLABLE_S = 60.0
"""A process that is still there so long after SIGKILL waits in the kernel, for a device or a file system."""
OVER, STORE = "megatron_hybrid/over", "megatron_hybrid/port"
"""Keys in the nodes' store of a start: a node has given up and the others shall not wait for it; the ranks' store."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a job."""

    job: str
    number: int
    """SLURM_NODEID: ranks are numbered in this order."""
    nodes: int
    name: str
    processes: int
    address: str
    """Of the first node, where all meet."""
    port: int
    restarts: int
    """How often all ranks of all nodes may be restarted."""
    grace: float
    """Seconds from SIGTERM to SIGKILL: one iteration and one checkpoint must fit."""
    logs: Path
    requeue: int = 0


def run_node(node: Node, command: list[str]) -> int:
    """Runs the ranks of a node to their end; 0, or the exit code of the first failing rank.

    SIGTERM, SIGINT and SIGUSR1 are forwarded to the ranks as SIGTERM; a second SIGINT kills them at once.

    Args:
        command: A Python program and its flags.
    """
    # The agent sets handlers for the signals in this variable over ours; this one is meant to kill
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint=f"{node.address}:{node.port}",
        run_id=f"{node.job}.{node.requeue}",
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        local_addr=_own_name(node),
        is_host=node.number == 0,
        read_timeout=300,  # nodes of a job start minutes apart at times
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=node.processes,
        entrypoint=sys.executable,
        args=("-I", die_with_parent.__file__, os.getpid(), sys.executable, "-I", rank.__file__, node.logs, *command),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=node.restarts,
        monitor_interval=POLL_S,
    )
    agent = _Agent(spec, node)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, agent.stop)
    try:
        result = agent.run()
    except SignalException:
        return 128 + signal.SIGTERM
    finally:
        spec.rdzv_handler.shutdown()
        # SIGTERM is repeated until this process has ended, and Python drops its own handlers before that: the signal
        # would turn the exit code of an orderly stop into 143
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return 0 if result.state == WorkerState.SUCCEEDED else agent.exit_code


def _own_name(node: Node) -> str:
    """A name of this node that resolves on it, and that no other node has with the same process id."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return f"127.0.0.{1 + node.number % 250}"
    return socket.gethostname()


class _Logs(LogsSpecs):
    """Leaves both streams to rank.py, which appends them to one file."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        return LogsDest(dict(none), dict(none), {}, {}, dict(none))

    @property
    def root_log_dir(self) -> str:
        return ""


class _Agent(LocalElasticAgent):
    """torchrun's agent (torch/distributed/elastic/agent/server/local_elastic_agent.py) with another way to stop."""

    def __init__(self, spec: WorkerSpec, node: Node):
        super().__init__(spec, _Logs())
        self.node = node
        self._remaining_restarts: int = node.restarts
        self.exit_code = 1
        self.deaths: dict[int, float] = {}
        """Local ranks to the time of their end, by the threads that wait for it."""
        self.tails: list[Tail] = []
        self.stop_at: float | None = None
        """When to kill the ranks that are still there; None: no stop was requested."""
        self.told_at = 0.0
        self.meeting = True

    # The nodes meet ------------------------------------------------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.meeting = True
        if self.stop_at is not None:
            raise SignalException("asked to stop", signal.SIGTERM)
        super()._rendezvous(worker_group)
        worker_group.master_addr, worker_group.master_port = self.node.address, self._store_of_the_ranks()
        self.meeting = False

    def _store_of_the_ranks(self) -> int:
        """The port of a new store, served by the first node.

        Upstream keeps one for all restarts (rendezvous/dynamic_rendezvous.py), and ranks would find in it the addresses
        of failed ranks.
        """
        if self.node.number == 0:
            self._ranks_store = TCPStore(self.node.address, 0, is_master=True, wait_for_workers=False)
            self._store.set(STORE, str(self._ranks_store.port))
        return int(self._store.get(STORE))

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Ranks in the order of SLURM's nodes rather than of their names, and one count of restarts for all.

        Upstream counts on each node the failures of its own ranks.
        """
        store.set(f"megatron_hybrid/node/{group_rank}", f"{self.node.number} {self._remaining_restarts}")
        said = [store.get(f"megatron_hybrid/node/{i}").decode().split() for i in range(group_world_size)]
        self._remaining_restarts = min(int(left) for _, left in said)
        numbers = sorted(int(number) for number, _ in said)
        return super()._assign_worker_ranks(store, numbers.index(self.node.number), group_world_size, spec)

    # The ranks start -----------------------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        world = worker_group.workers[0].world_size
        shown = [w.global_rank for w in worker_group.workers if w.global_rank in (0, world - 1)]
        self.tails = [Tail(self.node.logs / f"rank_{number:03}.log") for number in shown]
        self.deaths = {}
        pids = super()._start_workers(worker_group)
        for local_rank, pid in pids.items():
            threading.Thread(target=self._wait_for, args=(local_rank, pid, self.deaths), daemon=True).start()
        return pids

    @staticmethod
    def _wait_for(local_rank: int, pid: int, deaths: dict[int, float]) -> None:
        with suppress(ChildProcessError):  # the agent has collected it already
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # and the exit code is left to it
        deaths[local_rank] = time.time()

    # The ranks end -------------------------------------------------------------------------------------------

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: the ranks get it at the next poll, and the grace period starts now."""
        again = self.stop_at is not None
        now = time.monotonic()
        if not again:
            self.stop_at = now + self.node.grace
            self._note("signal", signal.Signals(number).name)
        elif number == signal.SIGINT:
            self.stop_at = now
        if self.meeting:
            raise SignalException("asked to stop", signal.SIGTERM)
        if not again:
            name, grace = signal.Signals(number).name, self.node.grace
            _say(f"{self.node.name}: {name}; the ranks save and stop, and are killed after {grace:.0f} s")

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._codes()
        if self.stop_at is not None:
            return self._stop_in_order(worker_group, codes)
        if any(codes.values()):
            deadline = time.monotonic() + LINGER_S
            while None in self._codes().values() and time.monotonic() < deadline:
                time.sleep(POLL_S / 2)
            self._record(self._codes())
            self._kill()
            if self.exit_code in FINAL_CODES:
                self._remaining_restarts = 0
            if self._remaining_restarts == 0:
                self._store.set(OVER, "1")
            else:
                number = self.node.restarts - self._remaining_restarts + 1
                _say(f"restarting all ranks: restart {number} of at most {self.node.restarts}")
        elif self._store.check([OVER]):
            self._kill()
            self._remaining_restarts = 0
        return super()._monitor_workers(worker_group)

    def _stop_in_order(self, worker_group: WorkerGroup, codes: dict[int, int | None]) -> RunResult:
        """Signals the ranks repeatedly, since one that is still importing may have no handler yet."""
        now = time.monotonic()
        assert self.stop_at is not None  # for mypy
        if any(codes.values()):
            self.stop_at = min(self.stop_at, now + STRAGGLE_S)
        if None in codes.values():
            if now >= self.stop_at:
                self._kill()
            elif now >= self.told_at + 1:
                self.told_at = now
                self._tell(signal.SIGTERM)
            return RunResult(state=WorkerState.HEALTHY)
        self._remaining_restarts = 0
        # An interpreter that is shutting down has no handlers any more
        orderly = all(code in (0, -signal.SIGTERM) for code in codes.values())
        if orderly:
            return RunResult(
                state=WorkerState.SUCCEEDED, return_values={w.global_rank: None for w in worker_group.workers}
            )
        self._record(codes)
        self._store.set(OVER, "1")
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL) -> None:
        """Upstream waits 30 s for ranks that hang in a collective, which cannot do anything useful any more."""
        self._kill()
        super()._shutdown(signal.SIGKILL)
        for tail in self.tails:
            tail.stop()
        self.tails = []

    def _handlers(self) -> dict[int, Any]:
        return getattr(self._pcontext, "subprocess_handlers", {})

    def _codes(self) -> dict[int, int | None]:
        """Local ranks to exit codes, negative for signals; None for those that run."""
        return {local_rank: handler.proc.poll() for local_rank, handler in self._handlers().items()}

    def _tell(self, number: signal.Signals) -> None:
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(number)

    def _kill(self) -> None:
        """Ends the ranks and what they started: each leads a process group."""
        for handler in self._handlers().values():
            with suppress(ProcessLookupError):
                os.killpg(handler.proc.pid, signal.SIGKILL)
        deadline = time.monotonic() + UNKILLABLE_S
        for handler in self._handlers().values():
            try:
                handler.proc.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"{self.node.name}: process {handler.proc.pid} survives kill -9; this node is given up")
                with suppress(Exception):  # the others will notice without this message, later
                    self._store.set(OVER, "1")
                os._exit(1)

    def _record(self, codes: dict[int, int | None]) -> None:
        """Records the failed ranks by time; the first one's exit code is the node's."""
        dead = [local_rank for local_rank, code in codes.items() if code]
        dead.sort(key=lambda local_rank: self.deaths.get(local_rank, time.time()))
        first = codes[dead[0]] or 1
        self.exit_code = first if first > 0 else 128 - first
        for local_rank in dead:
            code = codes[local_rank]
            assert code is not None  # for mypy
            self._note("death", events.reason(code), local_rank, code)

    def _note(self, kind: Any, reason: str, local_rank: int | None = None, code: int | None = None) -> None:
        dead: dict[str, Any] = {}
        if local_rank is not None:
            worker = self._worker_group.workers[local_rank]
            log = self.node.logs / f"rank_{worker.global_rank:03}.log"
            dead = {"rank": worker.global_rank, "local_rank": local_rank, "pid": worker.id, "code": code}
            dead |= {"time": self.deaths.get(local_rank, time.time())}
            if code != -signal.SIGKILL:  # it had no time to write any; its children's would be there
                dead |= {"last_words": events.last_words(log)}
            _say(f"rank {worker.global_rank} on {self.node.name} (process {worker.id}) failed: {reason}; see {log}")
        restart = self._worker_group.spec.max_restarts - self._remaining_restarts
        event = events.Event(
            kind=kind, node=self.node.name, requeue=self.node.requeue, restart=restart, reason=reason, **dead
        )
        try:
            events.append(self.node.logs, event)
        except OSError as error:  # a full disk is often the cause of the failure
            _say(f"{self.node.logs} misses this event: {error}")


def _say(text: str) -> None:
    """To standard error in one write: print is not for signal handlers."""
    os.write(2, f"launch: {text}\n".encode())
