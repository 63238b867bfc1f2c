"""Runs to watch, and the tool that watches them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_hybrid.run_folder import watch
from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.state import State, write_state

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, "tools/watch_run.py"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
EVEN = {"3": [0.25] * 4, "7": [0.25] * 4}


def add(run, *records):
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(i, **others):
    """A record of a step as a run writes it; the loss falls from 4 to 2."""
    found = {"iteration": i, "loss": 2 + 2 * math.exp(-i / 20), "grad_norm": 0.5 + 1 / i, "tokens": 1000 * i}
    return found | {"tokens_per_second": 900.0 + i % 7, "seconds": 1.1, "time": 1.7e9 + i} | others


def write_run(run, steps=60, status="finished", loads=EVEN):
    add(run, {"resume": 0, "time": 1.7e9}, *(step(i, expert_loads=loads) for i in range(1, steps + 1)))
    add(run, *({"iteration": i, "validation": "validation", "validation_loss": 2.5} for i in range(20, steps + 1, 20)))
    write_state(run, State(status=status, iteration=steps, train_iters=60))
    return run


def watched(*runs):
    found = [Progress(run, name) for run, name in zip(runs, watch.names(list(runs)), strict=True)]
    for run in found:
        run.update()
    return found


def tool(*arguments, **environment):
    return subprocess.run(
        [*TOOL, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def curves(drawn):
    return {curve.label: curve for plot in drawn[:1] for curve in plot.curves}


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
