"""One run of the fault campaign: started, disturbed, started again until it is finished, and judged."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import psutil

from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from megatron_hybrid.run_folder.checkpoints import Checkpoint, checkpoints, is_sealed, problems
from megatron_hybrid.run_folder.metrics import Follower, read_metrics
from megatron_hybrid.run_folder.state import read_state

ROOT = Path(__file__).parents[2]
RANKS = 2
ITERATIONS, SAVE_INTERVAL, EVAL_INTERVAL = 24, 4, 7
BOUND_S = 120.0
"""Without a new step, validation or start; the machine may be busy."""
STARTS = 4
"""Of the launcher: one for each fault and one more would do."""
KEYS = ("loss", "grad_norm", "learning_rate")


class Hang(Exception):
    """Something did not happen within the bound."""


@dataclass
class Verdict:
    """What became of a trial."""

    resumed: list[int] = field(default_factory=list)
    """Iterations that starts after the fault went on from."""
    due: int = 0
    """The iteration that the first of them had to go on from, or a later one."""
    redone: int = 0
    """Steps that were done twice."""
    recovery_s: float = 0.0
    """From the fault to the first new step behind it."""
    lost: bool = False
    wrong: list[str] = field(default_factory=list)
    hang: str = ""

    @property
    def failed(self) -> bool:
        return self.lost or bool(self.wrong) or bool(self.hang)


def write_corpus(folder: Path) -> Path:
    """The prefix of a small data set of random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder, "text", dtype_for(100)) as writer:
        generator = numpy.random.default_rng(0)
        for length in generator.integers(20, 200, 400):
            writer.add(generator.integers(0, 99, length).astype(numpy.uint16), numpy.array([length]))
        writer.finish()
    return folder / "text"


def flags(corpus: Path) -> list[str]:
    """A small mixture-of-experts hybrid with dropout, so that a random state or a bias that is lost shows."""
    return f"""--recipe demo --hybrid-layer-pattern M-P-*E --expert-model-parallel-size 1 --data-path {corpus}
    --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size 100 --train-iters {ITERATIONS}
    --lr-decay-iters {ITERATIONS} --lr-wsd-decay-iters 10 --seq-length 64 --micro-batch-size 1 --global-batch-size 4
    --hidden-dropout 0.1 --save-interval {SAVE_INTERVAL} --eval-interval {EVAL_INTERVAL} --eval-iters 4
    --log-interval 1 --device cpu --distributed-timeout-minutes 2 --data-cache-path {corpus.parent}/cache""".split()


class Trial:
    """A run's folder and its launcher. ``random`` draws all moments and places of the trial."""

    def __init__(self, folder: Path, corpus: Path, seed: str):
        self.folder, self.run, self.random = folder, folder / "run", random.Random(seed)
        self._corpus, self._mark = corpus, uuid.uuid4().hex
        self.more: list[str] = []
        """Further flags of the run."""
        self.variables: dict[str, str] = {}
        self.program = ROOT / "pretrain_hybrid.py"
        self.launcher: subprocess.Popen | None = None
        self.verdict = Verdict()
        self._fault_at: float | None = None
        self._starts_before = 0
        self._follower = Follower(self.run / "metrics.jsonl", keep=KEYS)
        self.output = folder / "output.log"
        folder.mkdir(parents=True, exist_ok=True)

    # Acts ----------------------------------------------------------------------------------------

    def start(self) -> None:
        words = [sys.executable, str(ROOT / "tools/launch.py"), "local", "--nproc", str(RANKS), "--max-restarts", "2"]
        words += ["--grace", "60", "--program", str(self.program), "--", *flags(self._corpus), "--save", str(self.run)]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
        env |= {"OMP_NUM_THREADS": "1", "FAULT_TRIAL": self._mark} | self.variables
        with self.output.open("ab") as out:
            self.launcher = subprocess.Popen([*words, *self.more], cwd=ROOT, env=env, stdout=out, stderr=out)

    def rank(self, rank: int) -> psutil.Process:
        """The training process of a rank: not one of its helpers."""
        found = [p for p in self._processes() if p.info["environ"].get("RANK") == str(rank)]
        inner = {p.pid for p in found}
        (process,) = [p for p in found if p.ppid() not in inner]
        return process

    def signal(self, process: psutil.Process | subprocess.Popen, number: signal.Signals) -> None:
        """The fault itself: notes what is saved by now, then strikes."""
        self.strike()
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(process.pid, number)

    def strike(self) -> None:
        """From here on counts what the run still has to have, and how long it takes."""
        whole = [c.iteration for c in checkpoints(self.run) if not problems(c.folder)]
        self.verdict.due = max(whole, default=0)
        self._fault_at = time.time()
        self._starts_before = len(read_metrics(self.run / "metrics.jsonl").starts)

    def end_for_good(self) -> None:
        """Ends all processes of the trial."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.launcher is not None:
            self.launcher.wait()

    # Moments -------------------------------------------------------------------------------------

    def iteration(self) -> int:
        self._follower.update()
        return next(reversed(self._follower.metrics.train), 0)

    def reach(self, iteration: int) -> None:
        """Waits until a step is done."""
        self.until(lambda: self.iteration() >= iteration, f"iteration {iteration} is done")

    def until(self, done: Callable[[], object], what: str, seconds: float = BOUND_S, poll: float = 0.002) -> None:
        size, deadline = -1, 0.0
        while not done():
            if (now := self._written()) != size:
                size, deadline = now, time.monotonic() + seconds
            if time.monotonic() > deadline:
                raise Hang(f"nothing has happened for {seconds:.0f} s, and it is not so that {what}")
            if self.launcher is not None and self.launcher.poll() is not None and not done():
                raise Hang(f"the launcher ended (code {self.launcher.returncode}) before {what}")
            time.sleep(poll)

    def somewhere_in_training(self) -> None:
        """A random moment between the first checkpoint and the end."""
        self.reach(self.random.randint(SAVE_INTERVAL + 1, ITERATIONS - 4))
        time.sleep(self.random.uniform(0, 0.1))

    def in_a_save(self) -> Path:
        """A random moment while a random checkpoint behind the first is being written; its folder."""
        iteration = SAVE_INTERVAL * self.random.randint(2, ITERATIONS // SAVE_INTERVAL - 1)
        folder = self.run / f"iter_{iteration:07d}"
        self.until(folder.is_dir, f"{folder} is begun", poll=0.0005)
        time.sleep(self.random.uniform(0, 0.08))
        return folder

    def in_an_evaluation(self) -> None:
        """A random moment of a random evaluation, as rank 0's log says it."""
        number = self.random.randint(1, ITERATIONS // EVAL_INTERVAL)
        self.until(lambda: self._log().count("Evaluating on") >= number, f"evaluation {number} has begun")
        time.sleep(self.random.uniform(0, 0.1))

    def _log(self) -> str:
        return "".join(p.read_text(errors="replace") for p in self.run.glob("logs/*/rank_000.log"))

    # Checkpoints ---------------------------------------------------------------------------------

    def sealed(self) -> list[Checkpoint]:
        """Newest first."""
        return [found for found in checkpoints(self.run) if is_sealed(found.folder)]

    def newest(self) -> Path:
        return self.sealed()[0].folder

    # The end -------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Starts the run again, as a queue would, until it says that it is finished."""
        for _ in range(STARTS):
            self.wait_for_the_launcher()
            self.until_nobody_is_left()
            state = read_state(self.run)
            if state is not None and state.status == "finished":
                return
            self.start()
        raise Hang(f"the run is not finished after {STARTS} starts")

    def wait_for_the_launcher(self) -> None:
        """Until it has ended, as long as the run gets on."""
        assert self.launcher is not None
        size, deadline = -1, 0.0
        while self.launcher.poll() is None:
            now = self._written()
            if now != size:
                size, deadline = now, time.monotonic() + BOUND_S
            if time.monotonic() > deadline:
                raise Hang(f"nothing has happened for {BOUND_S:.0f} s, and the launcher is there")
            time.sleep(0.05)

    def _written(self) -> int:
        """Bytes of metrics: grow with each step, validation and start."""
        try:
            return (self.run / "metrics.jsonl").stat().st_size
        except OSError:
            return 0

    def until_nobody_is_left(self) -> None:
        """Ranks of a launcher that has gone must go, too."""
        deadline = time.monotonic() + BOUND_S
        while any(p.status() != psutil.STATUS_ZOMBIE for p in self._processes() if p.is_running()):
            if time.monotonic() > deadline:
                raise Hang(f"processes outlive their launcher by {BOUND_S:.0f} s")
            time.sleep(0.1)

    def judge(self, reference: dict[int, tuple]) -> None:
        """Compares what the run has done with a run that was not disturbed."""
        metrics, verdict = read_metrics(self.run / "metrics.jsonl"), self.verdict
        verdict.resumed = [start["resume"] for start in metrics.starts[self._starts_before :]]
        if not verdict.resumed and self._fault_at is not None:
            verdict.wrong.append("the run was not disturbed")
        verdict.lost = bool(verdict.resumed) and verdict.resumed[0] < verdict.due
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        done = [r["iteration"] for r in records if "loss" in r]
        verdict.redone = len(done) - len(set(done))
        behind = [r["time"] for r in records if "loss" in r and self._fault_at and r["time"] > self._fault_at + 1]
        verdict.recovery_s = behind[0] - self._fault_at if behind and self._fault_at else 0.0
        found = results(self.run)
        if sorted(found) != sorted(reference):
            verdict.wrong.append(f"iterations {sorted(set(reference) ^ set(found))} are missing or too many")
        verdict.wrong += [
            f"iteration {i}: {found[i]} for {reference[i]}"
            for i in reference
            if i in found and found[i] != reference[i]
        ]

    def _processes(self) -> list[psutil.Process]:
        """Those of the trial's ranks, and of what they have started."""
        found = []
        for process in psutil.process_iter(["environ"]):
            environ = process.info["environ"] or {}
            if environ.get("FAULT_TRIAL") == self._mark and "RANK" in environ:
                found.append(process)
        return found


def results(run: Path) -> dict[int, tuple]:
    """Iteration to what a run computed there, to the bit: its last record of each."""
    metrics = read_metrics(run / "metrics.jsonl")
    found = {i: tuple(record[key] for key in KEYS) for i, record in metrics.train.items()}
    return {i: (*values, metrics.validation.get(i)) for i, values in found.items()}
