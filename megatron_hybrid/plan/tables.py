"""Figures as text."""

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_hybrid.pattern import LAYERS
from megatron_hybrid.plan.figures import Figures

BAR = 40
"""Characters of the longest bar."""


def show(found: Figures, console: Console) -> None:
    """Prints a plan."""
    console.print(Group(*_plan(found)))


def show_comparison(found: Figures, console: Console) -> None:
    """Prints architectures side by side."""
    console.print(_comparison(found))


def _comparison(found: Figures) -> Table:
    rows = found["architectures"]
    lengths = [(rows[0]["cache"]["lengths"].index(n), f"{n // 1024}K") for n in (8192, 131072)]
    words = {
        None: "Architectures, each as it is",
        "parameters": f"P-match: blocks that come nearest the parameters of {rows[0]['name']}, and its tokens",
        "flops": f"F-match: tokens that the training FLOPs of {rows[0]['name']} pay for ({found['convention']})",
    }
    return table(
        words[found["match"]],
        [
            "architecture",
            "blocks",
            "non-embedding",
            "active",
            "FLOPs/token, study",
            "model",
            "tokens",
            "iterations",
            "FLOPs, study",
            *(f"cache {name}, MiB" for _, name in lengths),
        ],
        [
            [
                f["name"],
                str(sum(LAYERS[c].kind == "mixer" for c in f["pattern"].partition("/")[0] if c in LAYERS)),
                quantity(f["parameters"]["non_embedding"]),
                quantity(f["parameters"]["active_non_embedding"]),
                *(f"{f['flops'][c]['per_token']:.3e}" for c in ("study", "model")),
                quantity(f["tokens"]),
                f"{f['iterations']:,}" if f["iterations"] else "",
                f"{f['flops']['study']['run']:.3e}" if f["tokens"] else "",
                *(mib(f["cache"]["total"][i]) for i, _ in lengths),
            ]
            for f in rows
        ],
    )


def _plan(f: Figures) -> Iterable[RenderableType]:
    yield Text(f"{f['name']}   {f['pattern']}", style="bold")
    yield Text(_layout(f))
    yield Text("")
    yield _parts(f)
    yield _flops(f)
    yield _cache(f)
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


def _cache(f: Figures) -> Table:
    cache = f["cache"]
    lengths = [f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}K" for n in cache["lengths"]]
    return table(
        "Cache of one sequence by context length, MiB in bfloat16",
        ["layers", *lengths],
        [[f"{symbol} {LAYERS[symbol].name}", *map(mib, sizes)] for symbol, sizes in cache["layers"].items()],
        ["  total", *map(mib, cache["total"])],
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


def mib(value: float) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:,.1f}"


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:,.2f}"
