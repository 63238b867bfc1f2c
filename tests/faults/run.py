"""A run that is disturbed: started as often as it needs, struck by one fault after the other, and judged."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_hybrid.run_folder.checkpoints import Checkpoint, checkpoints, is_sealed, problems
from megatron_hybrid.run_folder.metrics_file import Follower, read_metrics
from megatron_hybrid.run_folder.state import read_state

ROOT = Path(__file__).parents[2]
RANKS = 2
SAVE_INTERVAL, EVAL_INTERVAL, KEPT = 4, 7, 3
BOUND_S = 120.0
"""Without a new step, validation or start; the machine may be busy."""
STARTS = 4
"""Of the launcher in a row that lead to no step."""
DETERMINISTIC = "--deterministic-mode", {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What two undisturbed runs on GPUs need to be equal; Megatron demands the variables."""
KEYS = ("loss", "grad_norm", "learning_rate")


class Hang(Exception):
    """Something did not happen within the bound."""


@dataclass
class Verdict:
    """What became of one fault."""

    kind: str
    due: int = 0
    """The iteration from which the run had to go on, or from a later one."""
    resumed: int | None = None
    redone: int = 0
    """Steps that had been done before, and were done again."""
    recovery_s: float = 0.0
    """From the fault to the first new step behind it."""
    wrong: str = ""
    hang: str = ""

    @property
    def lost(self) -> bool:
        """Whether a step was lost that a whole checkpoint had."""
        return self.resumed is not None and self.resumed < self.due

    @property
    def failed(self) -> bool:
        return self.lost or bool(self.wrong or self.hang)


def flags(corpus: Path, iterations: int, device: str) -> list[str]:
    """A small mixture-of-experts hybrid with dropout, so that a random state or a bias that is lost shows."""
    return f"""--recipe demo --hybrid-layer-pattern M-P-*E --expert-model-parallel-size 1 --data-path {corpus}
    --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size 100 --train-iters {iterations}
    --lr-decay-iters {iterations} --lr-wsd-decay-iters 10 --seq-length 64 --micro-batch-size 1 --global-batch-size 4
    --hidden-dropout 0.1 --save-interval {SAVE_INTERVAL} --keep-last {KEPT} --eval-interval {EVAL_INTERVAL}
    --eval-iters 4 --log-interval 1 --device {device} --distributed-timeout-minutes 2
    --data-cache-path {corpus.parent}/cache {DETERMINISTIC[0] if device == "cuda" else ""}""".split()


@dataclass
class Run:
    """A run's folder and its launcher. ``random`` draws all moments and places."""

    folder: Path
    words: list[str]
    random: random.Random
    launcher: subprocess.Popen | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.save = self.folder / "run"
        self.save.mkdir(parents=True)
        self.order = self.folder / "nan"
        """Tells the program to make one loss NaN (nan_program.py)."""
        self._mark = uuid.uuid4().hex
        self._follower = Follower(self.save / "metrics.jsonl", keep=KEYS)
        self._fault_at, self._starts, self._reached = 0.0, 0, 0

    # Acts ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the launcher unless it is there."""
        if self.launcher is not None and self.launcher.poll() is None:
            return
        self._until_nobody_is_left()
        words = [sys.executable, str(ROOT / "tools/launch.py"), "local", "--nproc", str(RANKS), "--max-restarts", "2"]
        words += ["--grace", "60", "--program", str(Path(__file__).with_name("nan_program.py")), "--", *self.words]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
        env |= DETERMINISTIC[1] | {"OMP_NUM_THREADS": "1", "FAULT_RUN": self._mark, "FAULT_NAN": str(self.order)}
        with (self.folder / "output.log").open("ab") as out:
            self.launcher = subprocess.Popen(
                [*words, "--save", str(self.save)], cwd=ROOT, env=env, stdout=out, stderr=out
            )

    def strike(self) -> None:
        """The moment of a fault: notes what the run has to have from here on."""
        whole = [c.iteration for c in checkpoints(self.save) if not problems(c.folder)]
        self.verdicts[-1].due = max(whole, default=0)
        self._reached = self.iteration()
        self._fault_at, self._starts = time.time(), len(self._follower.metrics.starts)

    def signal(self, process: psutil.Process | subprocess.Popen, number: signal.Signals) -> None:
        """A fault that is a signal."""
        self.strike()
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(process.pid, number)

    def stop(self) -> Path:
        """Ends the run, by SIGTERM or kill -9, when it has two checkpoints; the newest."""
        self.until(lambda: len(self.sealed()) >= 2, "two checkpoints are sealed")
        self.launcher.send_signal(self.random.choice([signal.SIGKILL, signal.SIGTERM]))
        self.wait_for_the_launcher()
        self._until_nobody_is_left()
        return self.sealed()[0].folder

    def recover(self) -> None:
        """Starts the run again, as a queue would, until it has gone on by a step; or it has not, in time."""
        verdict = self.verdicts[-1]
        for _ in range(STARTS):
            self.start()
            with contextlib.suppress(Ended):
                self.until(self._has_gone_on, "the run goes on")
                break
        else:
            raise Hang(f"the run has not gone on after {STARTS} starts")
        metrics = self._follower.metrics
        verdict.resumed = metrics.starts[self._starts]["resume"]
        verdict.redone = max(0, self._reached - verdict.resumed)
        verdict.recovery_s = time.time() - self._fault_at

    def finish(self) -> None:
        """Starts the run again until it says that it is finished."""
        for _ in range(STARTS):
            self.start()
            self.wait_for_the_launcher()
            state = read_state(self.save)
            if state is not None and state.status == "finished":
                return
        raise Hang(f"the run is not finished after {STARTS} starts")

    def end_for_good(self) -> None:
        """Ends all processes of the run."""
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("FAULT_RUN") == self._mark:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if self.launcher is not None:
            self.launcher.wait()

    # What there is -------------------------------------------------------------------------------

    def rank(self, rank: int) -> psutil.Process:
        """The training process of a rank: not one of its helpers."""
        found = [p for p in self._ranks() if p.info["environ"].get("RANK") == str(rank)]
        inner = {p.pid for p in found}
        (process,) = [p for p in found if p.ppid() not in inner]
        return process

    def _ranks(self) -> Iterator[psutil.Process]:
        """Processes of ranks, and of what they have started."""
        for process in psutil.process_iter(["environ"]):
            environ = process.info["environ"] or {}
            if environ.get("FAULT_RUN") == self._mark and "RANK" in environ:
                yield process

    def iteration(self) -> int:
        """The last one that is done."""
        self._follower.update()
        return next(reversed(self._follower.metrics.train), 0)

    def sealed(self) -> list[Checkpoint]:
        """Newest first."""
        return [found for found in checkpoints(self.save) if is_sealed(found.folder)]

    def _has_gone_on(self) -> bool:
        self._follower.update()
        starts, train = self._follower.metrics.starts, self._follower.metrics.train
        return len(starts) > self._starts and next(reversed(train), 0) > starts[-1]["resume"]

    # Moments -------------------------------------------------------------------------------------

    def somewhere(self) -> None:
        """A random moment in one of the next steps."""
        goal = self.iteration() + self.random.randint(1, 2 * SAVE_INTERVAL)
        self.until(lambda: self.iteration() >= goal, f"iteration {goal} is done")
        time.sleep(self.random.uniform(0, 0.2))

    def in_a_save(self) -> None:
        """A random moment while the next checkpoint is being written; not the first: a run that has no other ends."""
        self.until(self.sealed, "a checkpoint is sealed")
        old = {found.folder for found in self.sealed()}

        def begun() -> bool:
            return any(c.folder not in old and not is_sealed(c.folder) for c in checkpoints(self.save))

        self.until(begun, "a save has begun", poll=0.0005)
        time.sleep(self.random.uniform(0, 0.3))

    def in_an_evaluation(self) -> None:
        """A random moment of the next evaluation, which begins when the step before it has been written down."""
        goal = (self.iteration() // EVAL_INTERVAL + 1) * EVAL_INTERVAL
        self.until(lambda: self.iteration() >= goal, f"iteration {goal} is done")
        time.sleep(self.random.uniform(0, 0.3))

    def until(self, done: Callable[[], object], what: str, poll: float = 0.005) -> None:
        """Waits for something, as long as the run gets on.

        Raises:
            Hang: It does not, for as long as the bound.
            Ended: The launcher ends before.
        """
        size, deadline = -1, 0.0
        while not done():
            if (now := self._written()) != size:
                size, deadline = now, time.monotonic() + BOUND_S
            if time.monotonic() > deadline:
                raise Hang(f"nothing has happened for {BOUND_S:.0f} s, and it is not so that {what}")
            if self.launcher.poll() is not None and not done():
                raise Ended(f"the launcher ended (code {self.launcher.returncode}), and it is not so that {what}")
            time.sleep(poll)

    def wait_for_the_launcher(self) -> None:
        """Until it has ended, as long as the run gets on."""
        self.until(lambda: self.launcher.poll() is not None, "the launcher ends", poll=0.05)

    def _until_nobody_is_left(self) -> None:
        """Ranks of a launcher that has gone must go, too."""
        deadline = time.monotonic() + BOUND_S
        while any(p.status() != psutil.STATUS_ZOMBIE for p in self._ranks()):
            if time.monotonic() > deadline:
                raise Hang(f"processes outlive their launcher by {BOUND_S:.0f} s")
            time.sleep(0.1)

    def _written(self) -> int:
        """Bytes of metrics: they grow with each start, step and validation."""
        try:
            return (self.save / "metrics.jsonl").stat().st_size
        except OSError:
            return 0


class Ended(Exception):
    """The launcher ended."""


def results(save: Path) -> dict[int, tuple]:
    """Iteration to what a run computed there, to the bit: its last record of each."""
    metrics = read_metrics(save / "metrics.jsonl")
    found = {i: tuple(record[key] for key in KEYS) for i, record in metrics.train.items()}
    return {i: (*values, metrics.validation.get(i)) for i, values in found.items()}
