"""Watch training runs: how far they are and how they go, live in a terminal and as PNG.

    python tools/watch_run.py runs/quickstart/run
    python tools/watch_run.py runs/a runs/b --last 5000 --png runs.png
    python tools/watch_run.py runs/a --once > now.txt

reads metrics.jsonl, state.json, run.json and the checkpoint pointer of each run's directory; it needs no GPU and does
not touch the run. It ends with Ctrl-C, or when all runs are finished or have failed. Where the output is no terminal it
is printed once. Where a plot has no room for all records, it shows the means of neighbours.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from watch_plots import COLORS, key, load_lines, plots, png, terminal_plots

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder.progress import Progress

BRIEF = ("iteration", "loss", "validation", "speed", "left")
"""What is told of each of several runs."""


def main() -> None:
    options = parser().parse_args()
    check(options)
    runs = [Progress(run, name) for run, name in zip(options.runs, names(options.runs), strict=True)]
    once = options.once or not sys.stdout.isatty()
    update(runs, options)
    if once and not any(run.metrics.train or run.metrics.validation for run in runs):
        raise ValueError(
            f"{runs[0].run / 'metrics.jsonl'} has no training record yet; look again after some iterations."
        )
    if not once:
        live(runs, options)
    size = shutil.get_terminal_size((100, 50))
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(screen(runs, options.last, size.columns, max(30, size.lines - 1), color))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="--save directories; several are overlaid")
    made.add_argument("--once", action="store_true", help="print once, also on a terminal")
    made.add_argument("--every", type=float, default=5, metavar="SECONDS", help="look again (default: 5)")
    made.add_argument("--last", type=int, metavar="N", help="plot the last N iterations only")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw the plots there as well, whenever there is news")
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
            raise ValueError(f"{run} is no directory; give the --save directory of a run.")
    if options.png and options.png.is_dir():
        raise ValueError(f"--png {options.png} is a directory; give a file.")


def names(runs: list[Path]) -> list[str]:
    """The directories' names, with as many of their parents as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return [str(Path(*p[-depth:])) for p in parts]


def update(runs: list[Progress], options: argparse.Namespace) -> None:
    """Reads what is new and, if there is any, draws the PNG: that costs a second or more of a processor."""
    before = [(run.written, run.state) for run in runs]
    for run in runs:
        run.update()
    new = before != [(run.written, run.state) for run in runs]
    if options.png and new and (drawn := plots(runs, options.last, 1000)):
        png(runs, drawn, title(runs), options.png)


def title(runs: list[Progress]) -> str:
    """One line for each run."""
    lines = []
    for run in runs:
        facts = run.facts()
        told = [facts["state"], *(f"{key} {facts[key]}" for key in BRIEF if key in facts)]
        lines.append(f"{run.name}: {', '.join(told)}")
    return "\n".join(lines)


def live(runs: list[Progress], options: argparse.Namespace) -> None:
    """Shows the runs until Ctrl-C, or until nothing more is to come; the terminal is as before then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def view() -> Text:
        width, height = console.size
        text = Text.from_ansi(screen(runs, options.last, width, height - 1, not console.no_color))
        text.no_wrap, text.overflow = True, "crop"
        return text

    shown = Live(view(), console=console, screen=True, auto_refresh=False)
    try:
        shown.start(refresh=True)  # no "with": a Ctrl-C in here has to give the terminal back, too
        while not all(run.over for run in runs):
            time.sleep(options.every)
            update(runs, options)
            shown.update(view(), refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        shown.stop()


def screen(runs: list[Progress], last: int | None, width: int, height: int, color: bool) -> str:
    """What there is to see, in about so many lines of at most ``width`` characters."""
    if len(runs) == 1:
        head = header(runs[0], width, None)
        loads = load_lines(runs[0], width, min(12, height // 3, height - len(head) - 10))
    else:
        head = [f"{key(i, color)} {line}" for i, run in enumerate(runs) for line in header(run, width - 3, BRIEF)]
        loads = []
    drawn = plots(runs, last, 2 * width)
    room = height - len(head) - len(loads) - 1
    body = terminal_plots(drawn, width, room, color) if drawn else ["no step is done yet"]
    return "\n".join([*head, "", *body, *loads])


def header(run: Progress, width: int, keys: Sequence[str] | None) -> list[str]:
    """The run's facts, filled into lines; with ``keys`` only these, as many as one line holds."""
    facts = run.facts()
    told = [facts.pop("state"), *(f"{k} {facts[k]}" for k in (facts if keys is None else keys) if k in facts)]
    lines = [f"{run.name}: {told[0]}"]
    for word in told[1:]:
        joined = f"{lines[-1]} | {word}"
        if len(joined) <= width:
            lines[-1] = joined
        elif keys is None:
            lines.append(f"  {word}")
        else:
            break
    return [line[:width] for line in lines]


if __name__ == "__main__":
    tool.run(main)
