"""Figures as text."""

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_hybrid.plan.figures import Figures

BAR = 40
"""Characters of the longest bar."""


def show(found: Figures, console: Console) -> None:
    """Prints a plan."""
    console.print(Group(*_plan(found)))


def _plan(f: Figures) -> Iterable[RenderableType]:
    yield Text(f"{f['name']}   {f['pattern']}", style="bold")
    yield Text(_layout(f))
    yield Text("")
    yield _parts(f)
    yield _flops(f)
    yield _pipeline(f)


def _layout(f: Figures) -> str:
    at = f["layout"]
    sizes = ", ".join(f"{name} {at[name]}" for name in ("tensor", "pipeline", "context", "expert", "data"))
    virtual = f" x {at['segments_per_stage']} segments" if at["segments_per_stage"] > 1 else ""
    return (
        f"{at['gpus']} GPUs: {sizes}{virtual}{', sequence parallel' if at['sequence_parallel'] else ''}; "
        f"{at['global_batch']:,} samples of {f['sequence_length']:,} tokens a step, {at['micro_batch']} in a "
        f"micro-batch, {at['micro_batches']} micro-batches"
    )


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None
) -> Table:
    """A table whose first column is words and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", header_style="dim")
    for row in rows:
        made.add_row(*row)
    if total:
        made.add_section()
        made.add_row(*total, style="bold")
    return made


def _parts(f: Figures) -> Table:
    parts = f["parts"]
    flops = sum(p["training_flops_per_token"] for p in parts)

    def row(name: str, count: str, total: int, active: int, cost: float, each: str = "") -> list[str]:
        return [name, count, each, f"{total:,}", f"{active:,}", f"{cost:.3e}", f"{cost / flops:.1%}"]

    return table(
        "Parameters and training FLOPs per token (every matrix product that is run)",
        ["part", "layers", "parameters each", "parameters", "active", "FLOPs per token", "share"],
        [
            row(
                f"{p['symbol'] or ' '} {p['name']}",
                str(p["count"]) if p["symbol"] else "",
                p["parameters"],
                p["active"],
                p["training_flops_per_token"],
                f"{p['parameters_each']:,}" if p["count"] > 1 else "",
            )
            for p in parts
        ],
        row("  total", "", f["parameters"]["total"], f["parameters"]["active"], flops),
    )


def _flops(f: Figures) -> Table:
    words = {
        "model": "model: every matrix product, output head included",
        "study": "study: arXiv:2510.04800, without embedding and head",
    }
    tokens = f["tokens"]
    run = f"run of {quantity(tokens)} tokens" if tokens else "run"
    return table(
        f"Training FLOPs; {f['parameters']['non_embedding']:,} parameters without embeddings, "
        f"{f['parameters']['active_non_embedding']:,} of them active",
        ["convention", "per token", "per sample", run],
        [
            [words[name], *(f"{c[k]:.3e}" if c[k] else "" for k in ("per_token", "per_sample", "run"))]
            for name, c in f["flops"].items()
        ],
    )


def _pipeline(f: Figures) -> RenderableType:
    stages = f["pipeline"]["stages"]
    if len(stages) == 1:
        return Text("")
    most = max(stage["share"] for stage in stages)
    return table(
        f"Work of the pipeline stages; the slowest is {f['pipeline']['imbalance']:.3f} times the mean",
        ["stage", "share", "", "layers"],
        [
            [str(i), f"{s['share']:.1%}", "█" * round(BAR * s["share"] / most), s["layers"]]
            for i, s in enumerate(stages)
        ],
    )


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and a letter: 59.9B, 2.10M."""
    if value is None:
        return ""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:,.2f}"
