#!/usr/bin/env python3
"""Train a recipe on real text under several sets of flags, and compare their losses.

    python tools/benchmarks/losses.py --arm 'bf16=--backend te' \
        --arm 'fp8=--backend te --fp8-format hybrid --fp8-recipe tensorwise'

The text is that of `make quickstart`: the sources of Python's standard library. All runs go at the same time on one
device, from the same initial weights where the layers are the same, and see the same batches. What is compared is the
mean loss of the last steps, with the first arm's; the exit code is 1 if one differs by more than --bound. Flags that
are not this program's go to all runs.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from megatron_hybrid.benchmarks import loss_comparison
from megatron_hybrid.cli import tool


def main() -> int:
    options, rest = parser().parse_known_args()
    arms = dict(arm.split("=", 1) for arm in options.arm if "=" in arm)
    if len(arms) != len(options.arm) or len(arms) < 2:
        raise ValueError("--arm NAME=FLAGS: give at least two, of different names.")
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps} and must be at least 1.")
    data = loss_comparison.prepare(options.data)
    if options.prepare:
        return 0
    common = ["--recipe", options.recipe, *shlex.split(loss_comparison.SHORT), *data]
    common += ["--device", options.device, "--train-iters", str(options.steps)]
    common += ["--lr-wsd-decay-iters", str(options.steps // 5), *rest]
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: [*common, *shlex.split(own)] for name, own in arms.items()}
        found = loss_comparison.run(flags, Path(folder), options.limit)
    apart = loss_comparison.differences(found)
    for name, values in found.items():
        marks = sorted({*range(0, len(values), max(1, len(values) // 8)), len(values) - 1})
        print(f"{name}: " + ", ".join(f"{n + 1}: {values[n]:.4f}" for n in marks))
        print(
            f"  mean of the last {min(loss_comparison.LAST, len(values))} steps: {apart[name]:+.3%} of the first arm's"
        )
    if options.json:
        options.json.write_text(json.dumps({"losses": found, "differences": apart}, indent=1) + "\n")
    return 1 if any(not abs(difference) <= options.bound for difference in apart.values()) else 0


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    made.add_argument("--recipe", default="paper-100m-intra", help="default: paper-100m-intra")
    made.add_argument("--arm", action="append", default=[], metavar="NAME=FLAGS", help="a run under these flags")
    made.add_argument("--steps", type=int, default=200, help="default: 200")
    made.add_argument("--bound", type=float, default=0.005, help="largest relative difference; default: 0.005")
    made.add_argument("--data", type=Path, default=Path("runs/quickstart"), help="folder of the text; made if missing")
    made.add_argument("--prepare", action="store_true", help="make the data set, and end")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    made.add_argument("--limit", type=float, default=600, help="seconds after which the runs have failed; default 600")
    made.add_argument("--json", type=Path, help="write all losses here")
    return made


if __name__ == "__main__":
    tool.run(lambda: sys.exit(main()))
