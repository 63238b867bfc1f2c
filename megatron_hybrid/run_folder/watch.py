"""Running runs in a terminal: facts, curves and expert loads."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.watch_plots import key, load_lines, plots, png, terminal_plots

BRIEF = ("iteration", "loss", "validation", "speed", "left")
"""Facts that are shown of each of several runs."""


def names(runs: list[Path]) -> list[str]:
    """The directories' names, with as many of their parents as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return [str(Path(*p[-depth:])) for p in parts]


def update(runs: list[Progress], last: int | None, picture: Path | None) -> None:
    """Reads what is new and, if there is any, draws the PNG: that costs a second or more of a processor."""
    before = [(run.written, run.state) for run in runs]
    for run in runs:
        run.update()
    new = before != [(run.written, run.state) for run in runs]
    if picture and new and (drawn := plots(runs, last, 1000)):
        png(runs, drawn, title(runs), picture)


def title(runs: list[Progress]) -> str:
    """One line for each run."""
    lines = []
    for run in runs:
        facts = run.facts()
        told = [facts["state"], *(f"{key} {facts[key]}" for key in BRIEF if key in facts)]
        lines.append(f"{run.name}: {', '.join(told)}")
    return "\n".join(lines)


def live(runs: list[Progress], last: int | None, picture: Path | None, every: float) -> None:
    """Shows the runs until Ctrl-C, or until all runs have ended; then the terminal is restored.

    every: Seconds between refreshes.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()

    def view() -> Text:
        width, height = console.size
        text = Text.from_ansi(screen(runs, last, width, height - 1, not console.no_color))
        text.no_wrap, text.overflow = True, "crop"
        return text

    shown = Live(view(), console=console, screen=True, auto_refresh=False)
    try:
        shown.start(refresh=True)  # no "with": a Ctrl-C in here has to give the terminal back, too
        while not all(run.over for run in runs):
            time.sleep(every)
            update(runs, last, picture)
            shown.update(view(), refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        shown.stop()


def screen(runs: list[Progress], last: int | None, width: int, height: int, color: bool) -> str:
    """The screen: about ``height`` lines of at most ``width`` characters."""
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
