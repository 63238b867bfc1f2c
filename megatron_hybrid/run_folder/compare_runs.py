"""Compares runs: a table of what they are and where their losses ended, and a plot of the losses."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_hybrid import pictures
from megatron_hybrid.run_folder.metrics_file import Metrics, Record, read_metrics
from megatron_hybrid.run_folder.run_info import read_run_info

TRAIN_STEPS = 20
"""The training loss of one step is that of a few samples; this many of the last ones are averaged."""


class Run(NamedTuple):
    """A run that has started to train."""

    label: str
    metrics: Metrics
    info: Record


def read_run(directory: Path, flag: str | None) -> Run:
    """Read a run; its label is the value of ``flag``, or the directory's name. Raises ValueError without records."""
    path = directory / "metrics.jsonl"
    metrics = read_metrics(path)
    if not metrics.train:
        raise ValueError(f"{path} has no training record; give the --save directories of runs that have trained.")
    info = read_run_info(directory)
    if flag is None:
        return Run(directory.resolve().name, metrics, info)
    name = flag.replace("-", "_")
    if name not in info.get("args", {}):
        raise ValueError(f"--by {flag}: {directory / 'run.json'} has no such flag; see its args for those it has.")
    return Run(str(info["args"][name]), metrics, info)


def read_groups(directories: Iterable[Path], flag: str | None) -> dict[str, list[Run]]:
    """Read runs; those with the same label are one group. Raises ValueError without records."""
    groups: dict[str, list[Run]] = {}
    for directory in directories:
        run = read_run(directory, flag)
        groups.setdefault(run.label, []).append(run)
    return groups


def table(groups: dict[str, list[Run]], heading: str) -> str:
    """Return a Markdown table, one row a group; what the records lack is left blank."""
    rows = [[heading, "runs", "parameters", "tokens", "train loss", "validation loss", "tokens/s"]]
    rows += [[label, str(len(runs)), *_figures(runs)] for label, runs in groups.items()]
    if all(len(runs) == 1 for runs in groups.values()):
        rows = [[label, *rest] for label, _, *rest in rows]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[label.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for label, *rest in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(runs: list[Run]) -> list[str]:
    """The columns of a row behind the number of runs."""
    last = [list(run.metrics.train.values())[-TRAIN_STEPS:] for run in runs]
    train = [statistics.fmean(record["loss"] for record in records) for records in last]
    validation = [list(run.metrics.validation.values())[-1] for run in runs if run.metrics.validation]
    # The median keeps out the first steps, which allocate, and other pauses.
    speeds = [r["tokens_per_second"] for run in runs for r in run.metrics.train.values() if r.get("tokens_per_second")]
    return [
        _counts([n for run in runs for n in _parameters(run)]),
        _counts([records[-1]["tokens"] for records in last if records[-1].get("tokens")]),
        _losses(train),
        _losses(validation),
        f"{statistics.median(speeds):,.0f}" if speeds else "",
    ]


def _parameters(run: Run) -> list[int]:
    """Parameters without the embeddings, if recorded."""
    total, embedding = run.info.get("parameters_total"), run.info.get("parameters_embedding")
    return [] if total is None or embedding is None else [total - embedding]


def _counts(values: list[int]) -> str:
    found = sorted(set(values))
    return "" if not found else f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _losses(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def draw(groups: dict[str, list[Run]], path: Path) -> None:
    """Draw training and validation loss over the tokens as a PNG, a colour for each group and a line for each run."""
    plt = pictures.pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    for number, (label, runs) in enumerate(groups.items()):
        for i, (_, metrics, _) in enumerate(runs):
            style = {"color": f"C{number % 10}", "label": None if i else label}
            tokens = {at: record.get("tokens") or at for at, record in metrics.train.items()}
            losses = _smooth([record["loss"] for record in metrics.train.values()])
            left.plot(list(tokens.values()), losses, linewidth=1, **style)
            at = [iteration for iteration in metrics.validation if iteration in tokens]
            right.plot([tokens[i] for i in at], [metrics.validation[i] for i in at], marker="o", linewidth=1, **style)
    left.set(title=f"training, mean of {TRAIN_STEPS} steps", xlabel="tokens", ylabel="loss (nats per token)")
    right.set(title="validation", xlabel="tokens")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    pictures.save(figure, path, dpi=100)


def _smooth(values: list[float]) -> list[float]:
    """The mean of each value and those before it, TRAIN_STEPS in all."""
    return [statistics.fmean(values[max(0, i + 1 - TRAIN_STEPS) : i + 1]) for i in range(len(values))]
