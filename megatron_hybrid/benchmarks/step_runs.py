"""Starts the runs that tools/benchmarks/step.py compares, one after the other on the GPU, and collects what they find.

Each run is a process of its own (:mod:`megatron_hybrid.benchmarks.measured_run`), so that none sees another's memory.
Imports take longer than a step: the next processes do theirs before the first has its turn, not while one is timed.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid import die_with_parent
from megatron_hybrid.argv import value
from megatron_hybrid.benchmarks.measured_run import GO, RESULT, Job
from megatron_hybrid.benchmarks.short_runs import ROOT
from megatron_hybrid.cli.recipes import recipe as known_recipe

ALWAYS = """--tokenizer-type NullTokenizer --mock-data --log-interval 1 --eval-interval 100000 --eval-iters 0"""
OURS = "ours"
RIVALS = {"before": "--ssm-kernels mamba_ssm --attention-kernel torch --loss-kernel plain"}
"""What a run can use in place of this package's kernels, by name: flags."""


@dataclass(frozen=True)
class Run:
    """A recipe under some flags."""

    recipe: str
    arm: str
    """Name of the flags."""
    argv: list[str]

    @property
    def name(self) -> str:
        return self.recipe if self.arm == OURS else f"{self.recipe}, {self.arm}"


@dataclass(frozen=True)
class Settings:
    """What is done in each run."""

    device: str
    processes: int
    warm_up: int
    steps: int
    profile: bool
    cold: bool
    """Every run begins with empty caches of compiled kernels."""
    limit_s: float
    """After which a run has failed."""
    tuning: str = ""
    """File of what mamba_ssm's kernels have chosen; without one, the first run chooses for the others."""


class Started:
    """A process that imports, and runs when it is told to."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True)
        python = [sys.executable, "-m"]
        if settings.processes > 1:
            count = str(settings.processes)
            python += ["torch.distributed.run", "--standalone", "--nproc_per_node", count, "-m"]
        program = [*python, "megatron_hybrid.benchmarks.measured_run", str(folder), settings.device]
        guard = [sys.executable, "-I", die_with_parent.__file__, str(os.getpid())]
        self.log = folder / "log.txt"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*guard, *program], stdout=stream, stderr=stream, env=self._environment(), start_new_session=True
            )

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.settings.processes)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        found = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if self.settings.cold:
            names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
            found |= {name: str(self.folder / name.lower()) for name in names}
        return found

    def run(self, job: Job) -> dict[str, Any]:
        """Gives the process its turn; what it found, or ``error``."""
        temporary = self.folder / f"{GO}.tmp"
        temporary.write_text(json.dumps(asdict(job)))
        temporary.replace(self.folder / GO)
        try:
            code = self.process.wait(self.settings.limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"it did not end within {self.settings.limit_s:g} s: {self._last()}"}
        finally:
            self.end()
        result = self.folder / RESULT
        if not result.exists():
            return {"error": f"exit code {code}: {self._last()}"}
        found = json.loads(result.read_text())
        return found | ({"ended_badly": f"exit code {code}: {self._last()}"} if code else {})

    def _last(self) -> str:
        """What the log says of a failure."""
        lines = self.log.read_text(errors="replace").splitlines()
        said = [n for n in lines if n.startswith("error: ")] or [n for n in lines if "Error" in n] or lines[-1:]
        return said[0] if said else "nothing was said"

    def end(self) -> None:
        """Ends the process and what it has started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def arms(rivals: Sequence[str], more: Sequence[str]) -> dict[str, list[str]]:
    """Flags of each arm, ours first.

    Args:
        rivals: Names in :data:`RIVALS`.
        more: ``NAME=FLAGS``.

    Raises:
        ValueError: One has no name or no flags, or a name stands for two.
    """
    found = {OURS: list[str](), **{name: RIVALS[name].split() for name in rivals}}
    for text in more:
        name, equals, words = text.partition("=")
        if not (name and equals and words):
            raise ValueError(f"--arm {text!r}: give a name and flags, such as --arm 'te=--backend te'.")
        if name in found:
            raise ValueError(f"--arm {name}: there is an arm of that name. Choose another.")
        found[name] = shlex.split(words)
    return found


def plan(recipes: Sequence[str], arms: dict[str, list[str]], rest: list[str], options: argparse.Namespace) -> list[Run]:
    """The runs in their order: arms of a recipe follow each other, and have the same batch.

    Args:
        rest: Flags of all runs.
        options: Of tools/benchmarks/step.py.

    Raises:
        ValueError: Flags that a run would be refused for.
    """
    steps = options.warm_up + options.steps + options.profile
    always = [*ALWAYS.split(), "--device", options.device, "--train-iters", str(steps)]
    found = []
    for recipe in recipes:
        known_recipe(recipe)
        flags = {arm: ["--recipe", recipe, *rest, *words, *always] for arm, words in arms.items()}
        known = [words for arm, words in flags.items() if arm == OURS or arm in RIVALS]
        size = options.micro_batch_size or min(_largest_micro_batch(words, options) for words in known)
        for arm, words in flags.items():
            batch = size * options.micro_batches * _replicas(words, options.processes)
            batches = ["--micro-batch-size", str(size), "--global-batch-size", str(batch)]
            found.append(Run(recipe, arm, [*words, *batches]))
    return found


def _replicas(argv: list[str], processes: int) -> int:
    kinds = ("tensor-model", "pipeline-model", "context")
    return max(1, processes // math.prod(int(value(argv, f"--{kind}-parallel-size", "1")) for kind in kinds))


def _largest_micro_batch(argv: list[str], options: argparse.Namespace) -> int:
    """What a run of these flags chooses on this machine's GPUs; on a CPU 1."""
    if options.device == "cpu":
        return 1
    import torch

    from megatron_hybrid.costs.hardware import MICRO_BATCHES, gpu_of_device
    from megatron_hybrid.plan import subject

    gpu = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is None:
        raise ValueError("--micro-batch-size is not given, and the memory of this machine's GPU is not known: give it.")
    batch = max(MICRO_BATCHES) * options.micro_batches * _replicas(argv, options.processes)
    words = [*argv, "--global-batch-size", str(batch)]
    return subject.read(words, options.processes, memory=gpu.capacity).args.micro_batch_size


def measure(
    runs: Sequence[Run], settings: Settings, folder: Path, say: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with what it found, as it ends."""
    ahead = max(1, min(len(runs), (os.cpu_count() or 1) // 2 // settings.processes))
    with ExitStack() as stack:
        waiting: deque[Started] = deque()

        def start(i: int) -> None:
            process = Started(folder / str(i), settings)
            stack.callback(process.end)
            waiting.append(process)

        for i, run in enumerate(runs):
            if not waiting:  # a group at a time, so that no process imports while another is timed
                for number in range(i, min(len(runs), i + ahead)):
                    start(number)
                _ready(waiting, settings.limit_s)
            say(f"{run.name} ...")
            tuning = settings.tuning or str(folder / "tuning.json")
            job = Job(run.argv, settings.warm_up, settings.steps, settings.profile, tuning)
            yield run, waiting.popleft().run(job)


def _ready(waiting: Sequence[Started], limit_s: float) -> None:
    """Waits until all processes have imported; one that fails says so at its turn."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if all((one.folder / "ready").exists() or one.process.poll() is not None for one in waiting):
            return
        time.sleep(0.05)
