"""Short runs of pretrain_hybrid.py on mock data, for the benchmarks that time whole steps."""

import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_hybrid.cli.processes import run_ranks
from megatron_hybrid.run_folder.metrics_file import Record, read_metrics

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = """--tokenizer-type NullTokenizer --mock-data --log-interval 1 --eval-interval 100000 --eval-iters 0
--save-interval 100000 --no-save-optim --no-save-rng --ckpt-format torch_dist"""
WARM_UP = 4
"""Steps of each run that are not timed."""


def train(argv: list[str], processes: int, device: str) -> list[Record]:
    """Trains in processes of its own and returns the records of its steps, those of the warm-up among them.

    Raises:
        ValueError: The run fails, with what it says, or has no step behind the warm-up.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = [str(ROOT / "pretrain_hybrid.py"), *argv, *ALWAYS.split(), "--device", device, "--save", folder]
        launch(program, processes, Path(folder))
        found = list(read_metrics(Path(folder) / "metrics.jsonl").train.values())
    if len(timed(found)) < 1:
        raise ValueError(f"the run has {len(found)} steps, and {WARM_UP + 1} warm it up: raise --train-iters.")
    return found


def launch(program: list[str], processes: int, folder: Path) -> None:
    """Runs a Python program and its flags under torchrun to its end; its log goes into the folder.

    Raises:
        ValueError: It fails, with what it says.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    log = folder / "log.txt"
    if run_ranks([*command, *program], processes, log):
        lines = log.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")] or [n for n in lines if "Error" in n]
        raise ValueError(f"the run failed: {said[0] if said else chr(10).join(lines[-30:])}")


def timed(records: list[Record]) -> list[float]:
    """Seconds of the steps behind the warm-up."""
    return [r["seconds"] for r in records if r.get("seconds")][WARM_UP:]


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, for the head of a report."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    found |= {name: metadata.version(name) for name in ("torch", "megatron-core")}
    if device == "cuda":
        import torch

        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found
