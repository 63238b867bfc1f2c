"""The allocation of a job: nodes, processes per node, and the rendezvous address."""

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT, PORTS = 20000, 10000
"""Ports for the rendezvous, chosen by the job id, so that two jobs rarely share one."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The machines of a job."""

    job: str
    """Its id, or a time stamp on one machine: the name of its folder of logs."""
    nodes: tuple[str, ...]
    processes: int
    """Ranks on each node."""
    cpus: int | None = None
    """Cores of the smallest node."""
    requeues: int = 0
    """How often SLURM has requeued the job."""

    @property
    def world(self) -> int:
        """Ranks of all nodes."""
        return len(self.nodes) * self.processes


def from_slurm(env: Mapping[str, str], processes: int | None, device: str) -> Allocation:
    """Reads the variables of a batch step.

    Args:
        processes: On each node; None takes one for each GPU, and on the CPU one.
        device: Of the run's --device: auto, cuda or cpu.

    Raises:
        ValueError: This is not a batch step, or it has no GPUs and the run needs them.
    """
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if not env.get(name)]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set, and SLURM sets it in a job: submit with sbatch (examples/slurm/pretrain.sbatch) "
            "or start on this machine with `tools/launch.py local`."
        )
    nodes = expand(env["SLURM_JOB_NODELIST"])
    gpus = _gpus(env, len(nodes))
    if processes is None:
        if not gpus and device != "cpu":
            raise ValueError(
                "The job has no GPUs: SLURM_GPUS_ON_NODE and SLURM_GPUS_PER_NODE are not set. Request some with "
                "#SBATCH --gpus-per-node=8, say how many with --nproc, or train with --device cpu."
            )
        processes = 1 if device == "cpu" else gpus
    elif gpus and device != "cpu" and processes != gpus:
        raise ValueError(
            f"--nproc {processes}, and the job has {gpus} GPUs on each node: each process takes one. Request "
            f"--gpus-per-node={processes}, or drop --nproc."
        )
    return Allocation(
        job=env["SLURM_JOB_ID"],
        nodes=tuple(nodes),
        processes=_positive(processes),
        cpus=_cpus(env),
        requeues=int(env.get("SLURM_RESTART_COUNT") or 0),
    )


def on_this_machine(job: str, processes: int, cpus: int | None) -> Allocation:
    """One node, this one. Raises ValueError for fewer than one process."""
    return Allocation(job=job, nodes=(socket.gethostname(),), processes=_positive(processes), cpus=cpus)


def _positive(processes: int) -> int:
    if processes < 1:
        raise ValueError(f"--nproc {processes}: a node runs at least 1 process.")
    return processes


def _gpus(env: Mapping[str, str], nodes: int) -> int:
    """GPUs on each node; 0 if nothing names any."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if value := env.get(name):
            return _count(value)
    if value := env.get("SLURM_GPUS"):
        return _count(value) // nodes
    return len([gpu for gpu in env.get("SLURM_JOB_GPUS", "").split(",") if gpu])


def _count(value: str) -> int:
    """8 of ``8``, ``h100:8`` and ``h100:4,a100:4``."""
    return sum(int(part.rsplit(":", 1)[-1]) for part in value.split(","))


def _cpus(env: Mapping[str, str]) -> int | None:
    """The fewest cores of a node in ``72(x2),36``."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if counts:
        return min(map(int, counts))
    return int(env["SLURM_CPUS_ON_NODE"]) if env.get("SLURM_CPUS_ON_NODE") else None


def expand(nodelist: str) -> list[str]:
    """The names in SLURM's short form, in its order: ``n[01-03,7],login`` is n01 n02 n03 n7 login.

    Raises:
        ValueError: Brackets that do not match, or an invalid range.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        found = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            ends = [text] if text else _numbers(ranges, nodelist)
            found = [name + end for name in found for end in ends]
        names += found
    if not names or nodelist.count("[") != nodelist.count("]"):
        raise ValueError(f"SLURM_JOB_NODELIST is {nodelist!r}: a list of nodes is such as n1,n[01-03,7].")
    return names


def _numbers(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        if not match:
            raise ValueError(f"SLURM_JOB_NODELIST is {nodelist!r}, and {one!r} in it is not a range such as 01-03.")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def meeting_address(first: str) -> str:
    """The first node's name, or where SLURM itself reaches it if the name does not resolve.

    Raises:
        ValueError: Neither resolves.
    """
    if _resolves(first):
        return first
    shown = subprocess.run(["scontrol", "show", "node", first], capture_output=True, text=True).stdout
    found = re.search(r"NodeAddr=(\S+)", shown)
    if found and _resolves(found[1]):
        return found[1]
    raise ValueError(
        f"{first}, the first node's name, does not resolve to an address: give one that all nodes can reach with "
        "--master-addr."
    )


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def free_port(first: int) -> int:
    """The first free port of this machine among the hundred from ``first`` on.

    Raises:
        ValueError: None is free.
    """
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a job's own last start may linger
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise ValueError(f"No port from {first} to {first + 99} is free on the first node: give one with --master-port.")
