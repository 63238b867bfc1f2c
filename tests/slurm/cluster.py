"""A cluster of start_cluster.sh and its jobs, as tests use them. Waits have an end, and show the job's logs then."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = Path(__file__).with_name("start_cluster.sh")
INSIDE_A_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "TORCHELASTIC_")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
LOG_LINES = 60


def wait_until(done: Callable[[], object], seconds: float, what: str, explain: Callable[[], str] = str) -> None:
    """Polls until ``done()`` is true; after ``seconds`` fails with ``what`` and what ``explain()`` says."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:.0f} s it is not so that {what}\n{explain()}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, nodes: int) -> "Cluster":
        done = subprocess.run(
            [START, "start", folder, str(nodes)], env=outside(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
        return cls(folder)

    def stop(self) -> None:
        subprocess.run([START, "stop", self.folder], env=outside(), check=True, timeout=60)

    def run(self, *command: str, variables: dict[str, str] | None = None) -> str:
        """Standard output of a command outside any job; fails with its standard error."""
        environment = outside() | {"SLURM_CONF": f"{self.folder}/slurm.conf"} | (variables or {})
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def node_state(self, node: str) -> set[str]:
        """Such as {DOWN, NOT_RESPONDING}: sinfo would show one of them, not always the one that matters."""
        shown = self.run("scontrol", "show", "node", "--oneliner", node)
        return set(re.findall(r"State=(\S+)", shown)[0].split("+"))

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd again and waits until SLURM gives it work."""
        subprocess.run([START, "node", self.folder, node], env=outside(), check=True, timeout=60)
        lost = {"DOWN", "NOT_RESPONDING"}
        wait_until(lambda: not lost & self.node_state(node), 60, f"{node} is back", lambda: str(self.node_state(node)))

    def miss(self, node: str) -> None:
        """Waits until SLURM has seen that a node is dead: that takes about 30 s."""
        state = self.node_state
        wait_until(lambda: "DOWN" in state(node), 90, f"SLURM has missed {node}", lambda: str(state(node)))

    def kill_node(self, node: str) -> None:
        """SIGKILL to all that runs on a node, as when its power fails: slurmd, daemons of steps, their processes."""
        ours = list(processes(self.folder))
        inside = [p for p in ours if p.environment.get("SLURMD_NODENAME") == node]
        daemons = {p.parent for p in inside}
        dying = [p for p in ours if p.words[:3] == ["slurmd", "-N", node]]
        assert len(dying) == 1 and inside, f"{node}: {len(dying)} slurmd, {len(inside)} processes of jobs"
        dying += [p for p in ours if p.pid in daemons and p.words and p.words[0].startswith("slurmstepd")]
        for process in dying + inside:
            process.signal(signal.SIGKILL)


@dataclass(frozen=True)
class Process:
    """What /proc says of a process."""

    pid: int
    parent: int
    words: list[str]
    environment: dict[str, str] = field(repr=False)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes(folder: Path) -> Iterator[Process]:
    """The living processes of a cluster: its daemons, and whatever runs in its jobs."""
    for entry in Path("/proc").iterdir():
        try:
            environment = dict(
                pair.split("=", 1)
                for pair in (entry / "environ").read_text(errors="replace").split("\0")
                if "=" in pair
            )
            if environment.get("SLURM_CONF") != f"{folder}/slurm.conf":
                continue
            words = (entry / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended, or is the kernel's
        yield Process(int(entry.name), parent, words, environment)


def outside() -> dict[str, str]:
    """This process's environment without what a job or a launcher around it has set; its Python comes first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(INSIDE_A_JOB)}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


@dataclass(frozen=True)
class Job:
    """A job that was submitted, and the files in which it speaks."""

    cluster: Cluster
    number: str
    logs: Path
    """All that lies in this folder is shown when a test fails."""

    @classmethod
    def submit(
        cls, cluster: Cluster, script: str, logs: Path, options: list[str], words: list[str], **variables: str
    ) -> "Job":
        """``sbatch OPTIONS SCRIPT WORDS`` with these variables, from the repository."""
        logs.mkdir(parents=True, exist_ok=True)
        command = ["sbatch", "--parsable", f"--output={logs}/batch-%j.log", *options, script, *words]
        return cls(cluster, cluster.run(*command, variables=variables).strip(), logs)

    def facts(self) -> dict[str, str]:
        """Name to value of ``scontrol show job``; of an array, of its task that is listed first."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def states(self) -> list[str]:
        """The state of the job, or of each task of an array."""
        return re.findall(r"JobState=(\S+)", self.cluster.run("scontrol", "show", "job", "--oneliner", self.number))

    def ended(self) -> bool:
        return all(state in ENDED for state in self.states())

    def wait(self, seconds: float) -> list[str]:
        """Waits for the job's end and returns its states."""
        self.wait_until(self.ended, seconds, f"job {self.number} has ended")
        return self.states()

    def wait_until(self, done: Callable[[], object], seconds: float, what: str) -> None:
        wait_until(done, seconds, what, self.report)

    def signal(self, name: str) -> None:
        """A signal to all steps of the job, as ``scancel --signal`` sends it."""
        self.cluster.run("scancel", f"--signal={name}", self.number)

    def processes(self) -> list[Process]:
        return [p for p in processes(self.cluster.folder) if p.environment.get("SLURM_JOB_ID") == self.number]

    def rank(self, rank: int) -> Process:
        """The training process of a global rank; fails if there is not exactly one."""
        found = [
            p
            for p in self.processes()
            if p.environment.get("RANK") == str(rank) and any(word.endswith("pretrain_hybrid.py") for word in p.words)
        ]
        found = [p for p in found if p.parent not in {other.pid for other in found}]  # not a data loader's worker
        assert len(found) == 1, f"{len(found)} processes of rank {rank}\n{self.report()}"
        return found[0]

    def log(self) -> str:
        """What the job has said so far, all files together."""
        return "\n".join(path.read_text(errors="replace") for path in self.files())

    def files(self) -> list[Path]:
        return sorted(p for p in self.logs.rglob("*") if p.is_file() and p.suffix in (".log", ".out", ".err", ".txt"))

    def report(self) -> str:
        """What SLURM says of the job, and the end of each of its files."""
        parts = [self.cluster.run("scontrol", "show", "job", self.number)]
        for path in self.files():
            parts += [f"==== {path}", *path.read_text(errors="replace").splitlines()[-LOG_LINES:]]
        return "\n".join(parts)
