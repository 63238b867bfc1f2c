#!/usr/bin/env python3
"""Time whole training steps of recipes on mock data, and say what the GPU does in them.

    python tools/benchmarks/step.py --recipes paper-1b-intra paper-1b-llama --json out.json --plot out.png
    python tools/benchmarks/step.py --recipes paper-1b-intra --rivals
    python tools/benchmarks/step.py --recipes paper-1b-intra --arm 'te=--backend te' --arm 'fp8=--backend te ...'

Each recipe is a run of pretrain_hybrid.py in a process of its own, one after the other; with --rivals, beside it
the same model with what users had before: mamba_ssm's kernels, padded attention and the plain loss. Flags that are not
this program's go to all runs. Without --micro-batch-size a run takes the largest that fits.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_hybrid.benchmarks import step_report, step_runs
from megatron_hybrid.benchmarks.step_runs import RIVALS, Run, Settings
from megatron_hybrid.cli import tool


def main() -> int:
    options, rest = parser().parse_known_args()
    options.profile = options.profile and options.device == "cuda"
    runs = planned(options, rest)
    if options.list:
        for run in runs:
            print(f"{run.name}\n  pretrain_hybrid.py {shlex.join(run.argv)}")
        return 0
    settings = Settings(
        options.device,
        options.processes,
        options.warm_up,
        options.steps,
        options.profile,
        options.cold,
        options.limit,
        str(options.tuning.absolute()) if options.tuning else "",
    )
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(options.device),
        "settings": settings.__dict__,
        "rows": [],
    }
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['environment'].items())}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for run, found in step_runs.measure(runs, settings, Path(folder), lambda text: print(text, flush=True)):
            report["rows"].append(step_report.row_of(run, found))
            print(step_report.describe(report["rows"][-1]), flush=True)
            write(report, options)  # what is measured is kept, whatever comes of the others
    show(report, options)
    return 1 if any("error" in row for row in report["rows"]) else 0


def planned(options: argparse.Namespace, rest: list[str]) -> list[Run]:
    """The runs that the options ask for.

    Raises:
        ValueError: Options that do not go together.
    """
    for name in ("steps", "warm_up", "micro_batches", "processes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)} and must be at least 1.")
    if options.micro_batch_size is not None and options.micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size is {options.micro_batch_size} and must be at least 1.")
    arms = step_runs.arms(list(RIVALS) if options.rivals else [], options.arm)
    return step_runs.plan(options.recipes, arms, rest, options)


def show(report: dict[str, Any], options: argparse.Namespace) -> None:
    rows = report["rows"]
    print(f"\n{step_report.table(rows)}\n")
    profiled = [row for row in rows if "classes_ms" in row]
    if profiled:
        print(step_report.class_table(rows))
        for row in profiled if options.kernels else []:
            print(f"{step_report.longest(row, options.kernels)}\n")
    print(step_report.LEGEND)
    if profiled:
        print(step_report.GPU_LEGEND)
    if options.plot and any("error" not in row for row in rows):
        step_report.plot(report, options.plot)
    if options.card:
        files = [path.name for path in (options.json, options.plot) if path]
        options.card.write_text(step_report.card(report, files))


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def environment(device: str) -> dict[str, str]:
    """Date, machine and versions."""
    from megatron_hybrid.benchmarks.timing import versions

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    found = versions(("megatron-core", "causal_conv1d", "transformer_engine"))
    return {"date": now, **{name: text for name, text in found.items() if text}}


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    made.add_argument(
        "--recipes", nargs="+", required=True, metavar="NAME", help="see pretrain_hybrid.py --list-recipes"
    )
    made.add_argument("--rivals", action="store_true", help=f"also: {', '.join(RIVALS)}")
    made.add_argument("--arm", action="append", default=[], metavar="NAME=FLAGS", help="also under these flags")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    made.add_argument("--processes", type=int, default=1, help="ranks of each run on this machine")
    made.add_argument("--micro-batch-size", type=int, help="default: the largest that fits in all arms")
    made.add_argument("--micro-batches", type=int, default=8, help="of a model replica in a step; default 8")
    made.add_argument("--warm-up", type=int, default=1, help="steps that are not timed; default 1")
    made.add_argument("--steps", type=int, default=4, help="steps that are timed; default 4")
    made.add_argument("--no-profile", dest="profile", action="store_false", help="leave out the step of the profile")
    made.add_argument("--kernels", type=int, default=0, metavar="N", help="show the N longest kernels of each run")
    made.add_argument("--cold", action="store_true", help="empty caches of compiled kernels before each run")
    made.add_argument("--limit", type=float, default=600, help="seconds after which a run has failed; default 600")
    made.add_argument("--tuning", type=Path, help="file that keeps what mamba_ssm's kernels have chosen by trial")
    made.add_argument("--list", action="store_true", help="show the runs and their flags, and end")
    made.add_argument("--json", type=Path, help="write everything here too")
    made.add_argument("--card", type=Path, help="write a card in Markdown, with links to the files beside it")
    made.add_argument("--plot", type=Path, help="draw MFU and kernels (.png)")
    return made


if __name__ == "__main__":
    tool.run(lambda: sys.exit(main()))
