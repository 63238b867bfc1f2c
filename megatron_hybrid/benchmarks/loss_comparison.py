"""Losses of one recipe on real text under several sets of flags: whether a faster way to compute learns as well."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid import die_with_parent
from megatron_hybrid.benchmarks.short_runs import ROOT
from megatron_hybrid.cli.quickstart import Quickstart
from megatron_hybrid.run_folder.metrics_file import read_metrics

SHORT = """--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 16 --global-batch-size 16
--lr 1e-3 --min-lr 1e-4 --log-interval 1 --eval-interval 100000 --eval-iters 0 --save-interval 100000"""
"""Of each run, behind the recipe's flags: 32,768 tokens a step."""
LAST = 20
"""Steps at the end whose mean loss is compared: that of a single one depends on its batch."""


def prepare(directory: Path) -> list[str]:
    """Corpus, tokenizer and data set in a folder, as ``make quickstart`` makes them; the flags that name them."""
    made = Quickstart(directory, None, ROOT)
    made.prepare()
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(made.tokenizer)]
    return ["--data-path", str(made.data_prefix), *tokenizer]


def run(arms: Mapping[str, Sequence[str]], folder: Path, limit_s: float) -> dict[str, list[float]]:
    """Runs pretrain_hybrid.py under the flags of each arm, all at the same time, and returns the losses of their steps.

    Args:
        arms: Name to flags.
        folder: Where logs and metrics go.
        limit_s: Seconds after which the runs have failed.

    Raises:
        ValueError: One fails, with what it says.
    """
    guard = [sys.executable, "-I", die_with_parent.__file__, str(os.getpid())]
    started: dict[str, Any] = {}
    try:
        for name, flags in arms.items():
            own = folder / name
            own.mkdir(parents=True)
            command = [*guard, sys.executable, str(ROOT / "pretrain_hybrid.py"), *flags, "--save", str(own)]
            with (own / "log.txt").open("wb") as log:
                started[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        end = time.monotonic() + limit_s
        for name, process in started.items():
            try:
                code = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise ValueError(f"{name} did not end within {limit_s:g} s.") from None
            if code:
                raise ValueError(f"{name} failed: {said(folder / name / 'log.txt')}")
    finally:
        for process in started.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    return {name: losses(folder / name) for name in arms}


def losses(folder: Path) -> list[float]:
    """Of the steps of a run, in order."""
    return [record["loss"] for _, record in sorted(read_metrics(folder / "metrics.jsonl").train.items())]


def said(log: Path) -> str:
    """What the log of a run says of its failure."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("error: ")] or [line for line in lines if "Error" in line]
    return found[-1] if found else "\n".join(lines[-10:])


def differences(found: Mapping[str, Sequence[float]], last: int = LAST) -> dict[str, float]:
    """Of each run's mean loss over its last steps, the relative difference from the first run's."""
    means = {name: sum(values[-last:]) / len(values[-last:]) for name, values in found.items()}
    first = next(iter(means.values()))
    return {name: mean / first - 1 for name, mean in means.items()}
