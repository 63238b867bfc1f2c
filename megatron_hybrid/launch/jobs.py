"""The launcher's programs: a batch step that starts an agent on each node, the agent, and one machine's agent alone."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_hybrid.argv import value
from megatron_hybrid.files import atomic_write
from megatron_hybrid.launch import allocation as allocations
from megatron_hybrid.launch import environment, events, preflight, requeue, summary
from megatron_hybrid.launch.allocation import Allocation
from megatron_hybrid.run_folder.checkpoints import pointer
from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.state import State, read_state

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tools" / "launch.py"
TELL_AGAIN_S = 10.0
"""Seconds between two attempts to reach SLURM's controller."""
REQUEUE_TRIES = 30


def slurm(args: argparse.Namespace, argv: list[str]) -> int:
    """The batch step: checks, starts `launch.py node` on every node, waits, and requeues the job.

    Args:
        args: The launcher's own flags.
        argv: pretrain_hybrid.py's.

    Returns:
        An exit code: 0 if the run is finished or requeued.
    """
    device = value(argv, "--device", "auto")
    allocation = allocations.from_slurm(os.environ, args.nproc, device)
    job = _Job(args, argv, allocation)
    address = args.master_addr or allocations.meeting_address(allocation.nodes[0])
    port = args.master_port or allocations.free_port(allocations.FIRST_PORT + int(allocation.job) % allocations.PORTS)
    step = ["srun", "--kill-on-bad-exit=1", f"--nodes={len(allocation.nodes)}", f"--ntasks={len(allocation.nodes)}"]
    # Steps do not inherit the job's processors: without the number, all ranks of a node would share one core
    step += ["--ntasks-per-node=1", f"--cpus-per-task={allocation.cpus or 1}", "--cpu-bind=none"]
    step += [sys.executable, str(LAUNCH), "node", *job.for_nodes(address, port)]
    told: list[subprocess.Popen] = []

    def tell(number: int, frame: object) -> None:
        """Neither srun nor the ranks get SIGUSR1, which would end them. scancel reaches all steps, not this one."""
        told.append(_scancel(allocation.job))

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, tell)
    job.show_start()
    # A group of its own: a signal to the batch step's would make srun kill all ranks at once
    code = _wait(subprocess.Popen(step, start_new_session=True), told, allocation.job)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # no step is left to signal, and SLURM's requeue signals this step
    for signalling in told:
        signalling.wait()  # a slow one would stop the job's next start

    def may_requeue(after: requeue.Next) -> requeue.Next:
        shown = subprocess.run(["scontrol", "show", "job", allocation.job], capture_output=True, text=True).stdout
        return requeue.unless_cancelled(after, shown)

    after = job.end(code, bool(told), "requeued", may_requeue)
    if after.requeue:
        return _requeue(allocation.job, lambda: may_requeue(after).requeue)
    return after.code


def _scancel(job: str) -> subprocess.Popen:
    """Sends SIGTERM to a job's steps. scancel does not know a job that is being cancelled, whose steps have SIGTERM."""
    return subprocess.Popen(["scancel", "--signal=TERM", job], stderr=subprocess.DEVNULL)


def _requeue(job: str, still: Callable[[], bool]) -> int:
    """Requeues this job, which also ends this process; retries for a while, since the controller may be busy."""
    for _ in range(REQUEUE_TRIES):
        code = subprocess.run(["scontrol", "requeue", job]).returncode
        if code == 0:
            return 0
        time.sleep(TELL_AGAIN_S)
        if not still():
            break
    return code


def local(args: argparse.Namespace, argv: list[str]) -> int:
    """One machine: the agent runs in this process."""
    device = value(argv, "--device", "auto")
    allocation = allocations.on_this_machine(
        time.strftime("%Y%m%d-%H%M%S"), args.nproc or 1, len(os.sched_getaffinity(0))
    )
    job = _Job(args, argv, allocation)
    port = args.master_port or allocations.free_port(allocations.FIRST_PORT + os.getpid() % allocations.PORTS)
    job.show_start()
    words = job.for_nodes("localhost", port)
    code = node(parser().parse_args(["node", *words[: words.index("--")]]), words[words.index("--") + 1 :], device)
    return job.end(code, False, "call it again").code


def node(args: argparse.Namespace, argv: list[str], device: str | None = None) -> int:
    """One node: sets the environment and runs torchrun's agent."""
    device = device or value(argv, "--device", "auto")
    os.environ.update(environment.defaults(os.environ, args.master_addr, args.nproc, args.cpus, device))
    from megatron_hybrid.launch import agent

    place = agent.Node(
        job=args.job,
        number=int(os.environ.get("SLURM_NODEID", 0)) if args.nodes > 1 else 0,
        nodes=args.nodes,
        name=os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        processes=args.nproc,
        address=args.master_addr,
        port=args.master_port,
        restarts=args.max_restarts,
        grace=args.grace,
        logs=args.logs,
        requeue=args.requeue,
    )
    return agent.run_node(place, [str(args.program), *argv])


class _Job:
    """The state of one start of a job."""

    def __init__(self, args: argparse.Namespace, argv: list[str], allocation: Allocation):
        """Checks the flags and makes the folders. Raises ValueError for a mistake in them."""
        self.args, self.allocation = args, allocation
        self.plan = preflight.check(argv, allocation)
        self.save = self.plan.save
        self.logs = self.save / "logs" / allocation.job
        self.logs.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.state_before = read_state(self.save)
        self.checkpoint_before = self._pointer()
        self.measured_before = self._measured()

    def for_nodes(self, address: str, port: int) -> list[str]:
        """The arguments of `launch.py node`."""
        allocation, args = self.allocation, self.args
        words = ["--master-addr", address, "--master-port", port, "--nodes", len(allocation.nodes)]
        words += ["--nproc", allocation.processes, "--cpus", allocation.cpus or 1, "--job", allocation.job]
        words += ["--requeue", allocation.requeues, "--logs", self.logs, "--max-restarts", args.max_restarts]
        words += ["--grace", args.grace, "--program", args.program, "--", *self.plan.argv]
        return [str(word) for word in words]

    def show_start(self) -> None:
        with suppress(OSError):  # on a full disk nothing is shown
            print(
                summary.start(self.allocation, self.plan, self.logs, self.args.max_restarts, self.args.grace),
                flush=True,
            )

    def end(
        self, code: int, signalled: bool, again: str, may_requeue: Callable[[requeue.Next], requeue.Next] | None = None
    ) -> requeue.Next:
        """Decides what comes next and prints the last screen; ``again`` is its text for another start."""
        seen = [event for event in events.read(self.logs) if event.requeue == self.allocation.requeues]
        # srun, too, signals the nodes that are left when one has failed
        signalled = signalled or code == 0 and any(event.kind == "signal" for event in seen)
        state = self._state()
        most = getattr(self.args, "max_requeues", 0)
        failed = self._failed_starts(counts=not signalled or self._measured() > self.measured_before)
        after = requeue.decide(state, code, signalled, seen, failed, most)
        if after.requeue and may_requeue is not None:
            after = may_requeue(after)
        next_ = f"{again if after.requeue else 'no more'}: {after.why}"
        run = Progress(self.save)
        with suppress(OSError):
            run.update()
        seconds = time.monotonic() - self.began
        with suppress(OSError):
            print(summary.end(self.allocation.job, run, self.logs, state is not None, seen, next_, seconds), flush=True)
        return after

    def _state(self) -> State | None:
        """The state that the run has written since this start."""
        state = read_state(self.save)
        return None if state == self.state_before else state

    def _failed_starts(self, counts: bool) -> int:
        """Starts in a row that left no new checkpoint, this one included if it ``counts``; kept next to the logs."""
        path = self.logs / "failed_starts.json"
        if self._pointer() != self.checkpoint_before:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return 1
        try:
            count = int(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            count = 0
        if not counts:
            return count
        count += 1
        try:
            with atomic_write(path) as stream:
                stream.write(f"{count}\n".encode())
        except OSError:  # a full disk: the count would stand still, and SLURM's of all starts does not
            count = max(count, self.allocation.requeues + 1)
        return count

    def _pointer(self) -> int | str | None:
        with suppress(OSError):
            return pointer(self.save)
        return None

    def _measured(self) -> int:
        """Bytes of metrics: they grow when the loop of training begins, and with each step."""
        with suppress(OSError):
            return (self.save / "metrics.jsonl").stat().st_size
        return 0


def _wait(process: subprocess.Popen, told: list[subprocess.Popen], job: str) -> int:
    """The exit code, as a shell gives it. A step is signalled repeatedly: it may have no handler yet."""
    while True:
        try:
            code = process.wait(TELL_AGAIN_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if told and told[-1].poll() is not None:
                told.append(_scancel(job))


def parser() -> argparse.ArgumentParser:
    """The launcher's own flags, which come before ``--``."""
    top = argparse.ArgumentParser(
        prog="tools/launch.py",
        usage="tools/launch.py slurm|local [launcher's flags] -- pretrain_hybrid.py's flags",
        description="Runs pretrain_hybrid.py on all nodes of a SLURM job or on this machine; restarts failed runs.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="where", required=True)
    for name, about in (
        ("slurm", "in a batch step: on all nodes of the job"),
        ("local", "on this machine"),
        ("node", "internal: started by `slurm` on each node"),
    ):
        one = commands.add_parser(name, help=about, allow_abbrev=False)
        default = "one per GPU; on the CPU 1" if name == "slurm" else "1"
        one.add_argument("--nproc", type=int, metavar="N", help=f"processes on each node (default: {default})")
        one.add_argument(
            "--max-restarts", type=int, default=3, metavar="N", help="restarts after failures within a job (default: 3)"
        )
        one.add_argument(
            "--grace", type=float, default=300.0, metavar="SECONDS", help="time to save after SIGTERM (default: 300)"
        )
        one.add_argument("--master-addr", metavar="HOST", help="rendezvous address (default: the first node)")
        one.add_argument("--master-port", type=int, metavar="PORT", help="rendezvous port (default: by the job id)")
        one.add_argument(
            "--program",
            type=Path,
            default=ROOT / "pretrain_hybrid.py",
            help="program to start, with the flags of pretrain_hybrid.py (default)",
        )
        if name == "slurm":
            one.add_argument(
                "--max-requeues",
                type=int,
                default=3,
                metavar="N",
                help="requeues in a row without a new checkpoint (default: 3)",
            )
        if name == "node":
            for flag, kind in (("--nodes", int), ("--cpus", int), ("--requeue", int), ("--job", str), ("--logs", Path)):
                one.add_argument(flag, type=kind, required=True)
    return top
