"""The steps of ``make quickstart``: corpus, tokenizer, data, training, summary; skipped when done before."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_hybrid.cli.processes import run_ranks
from megatron_hybrid.run_folder.metrics_file import Follower, is_step
from megatron_hybrid.run_folder.run_info import read_run_info

VOCAB_SIZE = 4096
PROCESSES = 2


class StepFailed(Exception):
    """A step's command failed; the message says which, and where its log is."""


class Quickstart:
    """The steps, and where their files are.

    root: The clone, with the programs of each step.
    """

    def __init__(self, directory: Path, iterations: int | None, root: Path) -> None:
        self.root = root
        self.corpus = directory / "data" / "corpus.jsonl"
        self.tokenizer = directory / "data" / "tokenizer.model"
        self.data_prefix = directory / "data" / "corpus_text_document"
        self.run_dir = directory / "run"
        self.log = directory / "pretrain.log"
        self.done = directory / "pretrain.done"
        self.iterations = iterations
        self.rebuilt = False

    def step(self, name: str, done: bool, action: Callable[[], None]) -> bool:
        """Run ``action`` unless it is done; print one line with its time. True if it ran."""
        if done:
            print(f"[{name}] done before", flush=True)
            return False
        began = time.perf_counter()
        action()
        print(f"[{name}] {time.perf_counter() - began:.0f} s", flush=True)
        return True

    def prepare(self) -> None:
        """Make corpus, tokenizer and data set. Raises StepFailed."""
        index = self.data_prefix.with_name(self.data_prefix.name + ".idx")
        for name, output, action in (
            ("corpus", self.corpus, self.build_corpus),
            ("tokenizer", self.tokenizer, self.train_tokenizer),
            ("preprocess", index, self.preprocess),
        ):
            # What a step made fits only the files that it was made from.
            done = output.exists() and not self.rebuilt
            self.rebuilt |= self.step(name, done, action)

    def run(self) -> None:
        """Run all steps. Raises StepFailed."""
        self.prepare()
        if self.rebuilt:
            self.set_aside_run()
        command = self.pretrain_command()
        done = self.done.exists() and self.done.read_text() == " ".join(command)
        self.step("pretrain", done, lambda: self.pretrain(command))
        self.step("summary", False, lambda: self.call_tool("summarize_run.py", str(self.run_dir)))

    def build_corpus(self) -> None:
        self.call_tool("build_stdlib_corpus.py", "--output", str(self.corpus.parent))

    def train_tokenizer(self) -> None:
        arguments = ["--input", str(self.corpus), "--output", str(self.tokenizer)]
        self.call_tool("train_tokenizer.py", *arguments, "--vocab-size", str(VOCAB_SIZE), "--overwrite")

    def preprocess(self) -> None:
        prefix = self.corpus.with_suffix("")
        arguments = ["--input", str(self.corpus), "--output-prefix", str(prefix)]
        # Seconds of work: after an interruption it is repeated, as it has to be for another tokenizer.
        arguments += ["--tokenizer-model", str(self.tokenizer), "--append-eod", "--overwrite"]
        self.call_tool("preprocess_data.py", *arguments)

    def set_aside_run(self) -> None:
        """Move a run on other data out of the way: its weights belong to another vocabulary."""
        self.done.unlink(missing_ok=True)
        if self.run_dir.exists():
            old = self.run_dir.with_name(f"run.{time.strftime('%Y%m%d-%H%M%S')}")
            shutil.move(self.run_dir, old)
            print(f"the data were rebuilt, so the earlier run was moved to {old}", flush=True)

    def pretrain_command(self) -> list[str]:
        """Return the training command; --standalone picks a free port for the rendezvous."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(PROCESSES), str(self.root / "pretrain_hybrid.py")]
        command += ["--recipe", "demo", "--device", "cpu", "--data-path", str(self.data_prefix)]
        command += ["--tokenizer-type", "SentencePieceTokenizer"]
        command += ["--tokenizer-model", str(self.tokenizer)]
        command += ["--save", str(self.run_dir), "--load", str(self.run_dir)]
        if self.iterations is not None:
            command += ["--train-iters", str(self.iterations)]
        return command

    def pretrain(self, command: list[str]) -> None:
        """Train, with the output in a log file and the progress read from the run's metrics."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        print(f"[pretrain] starting {PROCESSES} processes, log: {self.log}", flush=True)
        progress = Progress(self.run_dir)
        try:
            code = run_ranks(command, PROCESSES, self.log, progress.show)
        except BaseException:
            print("\nto continue the training, run the same command again", flush=True)
            raise
        progress.close()
        if code:
            print(failure_lines(self.log), file=sys.stderr)
            raise StepFailed(
                f"training ended with exit code {code}; the end of {self.log} is "
                "above. Running the same command again continues from the last checkpoint."
            )
        self.done.write_text(" ".join(command))

    def call_tool(self, name: str, *arguments: str) -> None:
        """Run one of the tools; raises StepFailed if it fails (it has said why)."""
        command = [sys.executable, str(self.root / "tools" / name), *arguments]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise StepFailed(f"tools/{name} ended with exit code {code}.")


class Progress:
    """A short progress line: rewritten in place on a terminal, else one every 15 seconds."""

    def __init__(self, run_dir: Path) -> None:
        self.follower, self.run_dir = Follower(run_dir / "metrics.jsonl", keep=()), run_dir
        self.terminal = sys.stdout.isatty()
        self.shown_at = 0.0
        self.last = ""
        self.follower.update()  # of earlier starts

    def show(self) -> None:
        """Print the newest training record of this start, if it is time to."""
        now = time.monotonic()
        if now - self.shown_at < (1 if self.terminal else 15):
            return
        self.shown_at = now
        train = [record for record in self.follower.records() if is_step(record)]
        if train:
            self.print(train[-1])

    def print(self, record: dict) -> None:
        """Print one training record."""
        total = read_run_info(self.run_dir).get("args", {}).get("train_iters")
        line = f"  iteration {record['iteration']}{f'/{total}' if total else ''}"
        line += f"  loss {record['loss']:.3f}"
        if record.get("tokens_per_second"):
            line += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if line != self.last:
            print(f"\r{line:<60}" if self.terminal else line, end="", flush=True)
            if not self.terminal:
                print(flush=True)
        self.last = line

    def close(self) -> None:
        """Show the last record and end the line."""
        self.shown_at = float("-inf")
        self.show()
        if self.terminal and self.last:
            print(flush=True)


def failure_lines(log: Path, count: int = 30) -> str:
    """Return the last lines of a log before the launcher's own report, which never has the cause."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    launcher = [
        i for i, line in enumerate(lines) if "torch/distributed/elastic" in line and line.startswith(("E", "W"))
    ]
    return "\n".join(lines[: launcher[0] if launcher else None][-count:])
