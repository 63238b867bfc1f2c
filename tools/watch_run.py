"""Monitor training runs: progress, loss, speed and expert loads, live in a terminal and as PNG.

    python tools/watch_run.py runs/quickstart/run
    python tools/watch_run.py runs/a runs/b --last 5000 --png runs.png
    python tools/watch_run.py runs/a --once > now.txt

reads metrics.jsonl, state.json, run.json and the checkpoint pointer of each run's directory; it needs no GPU and does
not touch the run. It ends with Ctrl-C, or when all runs are finished or have failed. If the output is not a terminal,
it prints once. A plot without room for all records shows the means of neighbours.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.watch import live, names, screen, update
from megatron_hybrid.run_folder.watch_plots import COLORS


def main() -> None:
    options = parser().parse_args()
    check(options)
    runs = [Progress(run, name) for run, name in zip(options.runs, names(options.runs), strict=True)]
    once = options.once or not sys.stdout.isatty()
    update(runs, options.last, options.png)
    if once and not any(run.metrics.train or run.metrics.validation for run in runs):
        raise ValueError(
            f"{runs[0].run / 'metrics.jsonl'} has no training record yet; look again after some iterations."
        )
    if not once:
        live(runs, options.last, options.png, options.every)
    size = shutil.get_terminal_size((100, 50))
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(screen(runs, options.last, size.columns, max(30, size.lines - 1), color))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="--save directories; several are overlaid")
    made.add_argument("--once", action="store_true", help="print once, also on a terminal")
    made.add_argument(
        "--every", type=float, default=5, metavar="SECONDS", help="seconds between refreshes (default: 5)"
    )
    made.add_argument("--last", type=int, metavar="N", help="plot only the last N iterations")
    made.add_argument(
        "--png", type=Path, metavar="FILE", help="also write the plots to this file when there are new records"
    )
    return made


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be watched."""
    if not 0 < options.every <= 86400:
        raise ValueError(f"--every {options.every:g}: give seconds, above 0 and at most 86,400.")
    if options.last is not None and options.last < 1:
        raise ValueError(f"--last {options.last}: give a number of iterations, at least 1.")
    if len(options.runs) > len(COLORS):
        raise ValueError(f"{len(options.runs)} runs are too many to tell apart; give at most {len(COLORS)}.")
    for run in options.runs:
        if not run.is_dir():
            raise ValueError(f"{run} is not a directory; give the --save directory of a run.")
    if options.png and options.png.is_dir():
        raise ValueError(f"--png {options.png} is a directory; give a file.")


if __name__ == "__main__":
    tool.run(main)
