"""Figures as text."""

import shlex
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan.figures import Figures

BAR = 40
"""Characters of the longest bar."""


def show(found: Figures, console: Console) -> None:
    """Prints a plan."""
    console.print(Group(*_plan(found)))


def show_comparison(found: Figures, console: Console) -> None:
    """Prints architectures side by side."""
    console.print(_comparison(found))


def _comparison(found: Figures) -> Group:
    rows = found["architectures"]
    lengths = [(rows[0]["cache"]["lengths"].index(n), f"{n // 1024}K") for n in (8192, 131072)]
    timed = "time" in rows[0]
    words = {
        None: "Architectures, each as it is",
        "parameters": "P-match: blocks that come nearest the active non-embedding parameters of "
        f"{rows[0]['name']}, and its tokens",
        "flops": f"F-match: tokens that the training FLOPs of {rows[0]['name']} pay for ({found['convention']})",
    }
    heading = words[found["match"]]
    if timed:
        heading += f"; times on {_short_layout(rows[0])}"
    return table(
        heading,
        [
            "architecture",
            "blocks",
            "non-embedding",
            "active",
            "FLOPs/token, paper",
            *([] if timed else ["model"]),
            "tokens",
            *([] if timed else ["iterations"]),
            "FLOPs, paper",
            *(f"cache {name}, MiB" for _, name in lengths),
            *(["GiB a GPU", "tokens/day", "days"] if timed else []),
        ],
        [
            [
                f["name"],
                str(sum(LAYERS[c].kind == "mixer" for c in f["pattern"].partition("/")[0] if c in LAYERS)),
                quantity(f["parameters"]["non_embedding"]),
                quantity(f["parameters"]["active_non_embedding"]),
                *(f"{f['flops'][c]['per_token']:.3e}" for c in (["paper"] if timed else ["paper", "model"])),
                quantity(f["tokens"]),
                *([] if timed else [f"{f['iterations']:,}" if f["iterations"] else ""]),
                f"{f['flops']['paper']['run']:.3e}" if f["tokens"] else "",
                *(mib(f["cache"]["total"][i]) for i, _ in lengths),
                *(_days(f) if timed else []),
            ]
            for f in rows
        ],
    )


def _days(f: Figures) -> list[str]:
    """Memory and time; no time where the memory does not do."""
    need, time = max(row["total"] for row in f["memory"]), f["time"]
    if need > f["machine"]["limit"]:
        return [gib(need), "does not fit", ""]
    return [gib(need), quantity(time["tokens_per_day"]), f"{time['days']:.1f}" if time["days"] else ""]


def _short_layout(f: Figures) -> str:
    at = f["layout"]
    sizes = [f"{name} {at[name]}" for name in ("tensor", "pipeline", "context", "expert", "data") if at[name] > 1]
    return f"{at['gpus']} x {f['time']['gpu']}, {f['time']['efficiency']:.0%} of the peak" + ", ".join(["", *sizes])


def _plan(f: Figures) -> Iterable[RenderableType]:
    yield Text(f["name"] if f["name"] == f["pattern"] else f"{f['name']}   {f['pattern']}", style="bold")
    yield Text(_layout(f) + "\n")
    yield _parts(f)
    yield _flops(f)
    yield _cache(f)
    yield _memory(f)
    if "machine" in f:
        yield Text(_fits(f) + "\n")
    yield _activations(f)
    yield _communication(f)
    yield _pipeline(f)
    if "time" in f:
        yield _time(f)


def _layout(f: Figures) -> str:
    at = f["layout"]
    sizes = ", ".join(f"{name} {at[name]}" for name in ("tensor", "pipeline", "context", "expert", "data"))
    plural = "" if at["gpus"] == 1 else "s"
    virtual = f" x {at['segments_per_stage']} segments" if at["segments_per_stage"] > 1 else ""
    return (
        f"{at['gpus']} GPU{plural}: {sizes}{virtual}{', sequence parallel' if at['sequence_parallel'] else ''}; "
        f"{at['global_batch']:,} samples of {f['sequence_length']:,} tokens a step, {at['micro_batch']} in a "
        f"micro-batch, {at['micro_batches']} micro-batches"
    )


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None
) -> Group:
    """A heading and a table whose first column is words and whose others are numbers, or layers and bars."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for i, column in enumerate(columns):
        words = i == 0 or column in ("what it holds", " ", "recompute")
        made.add_column(column, justify="left" if words else "right", header_style="dim", overflow="fold")
    for row in rows:
        made.add_row(*row)
    if total:
        made.add_section()
        made.add_row(*total, style="bold")
    return Group(Text(title, style="bold"), made, Text(""))


def _parts(f: Figures) -> Group:
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


def _flops(f: Figures) -> Group:
    words = {
        "model": "model: every matrix product, output head included",
        "paper": "paper: arXiv:2510.04800, without embedding and head",
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


def _cache(f: Figures) -> Group:
    cache = f["cache"]
    lengths = [f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}K" for n in cache["lengths"]]
    return table(
        "Cache of one sequence by context length, MiB in bfloat16",
        ["layers", *lengths],
        [[f"{symbol} {LAYERS[symbol].name}", *map(mib, sizes)] for symbol, sizes in cache["layers"].items()],
        ["  total", *map(mib, cache["total"])],
    )


MEMORY = ("parameters", "gradients", "optimizer", "activations", "total")


def _fits(f: Figures) -> str:
    need, machine = max(row["total"] for row in f["memory"]), f["machine"]
    of = f"{gib(need)} of {gib(machine['memory'])} GiB of {machine['gpu']}"
    if need <= machine["limit"]:
        return f"Fits: {of}, which keeps a tenth free for the CUDA context, collectives and fragments."
    return f"DOES NOT FIT: {of}, a tenth of which stays free. The times below are of a larger GPU; try --fit."


def _memory(f: Figures) -> Group:
    return table(
        "Memory of the fullest rank of each pipeline stage, GiB",
        ["stage", *MEMORY],
        [[str(i), *(gib(row[name]) for name in MEMORY)] for i, row in enumerate(f["memory"])],
    )


def _activations(f: Figures) -> Group:
    words = {"head": "output head and loss", "mtp": "an MTP head beside its layers"}
    how = f["implementation"]
    again = how["recompute"]
    if isinstance(again, str):
        kept = f"; full recomputation ({again}) keeps the input of each group alone, and one group is alive again"
    else:
        kept = f"; recomputed: {', '.join(again)}" if again else ""
    made_by = f"{how['backend']} layers, {how['scan']} scan, {how['loss']} loss"
    return table(
        f"Activations of one micro-batch on a rank, MiB ({made_by}){kept}",
        ["part", "each"],
        [
            [f"{name} {LAYERS[name].name}" if name in LAYERS else words.get(name, name), mib(size)]
            for name, size in f["activations"].items()
        ],
    )


def _communication(f: Figures) -> RenderableType:
    if not f["communication"]:
        return Text("No messages between ranks\n")
    return table(
        "Sent by a rank in a step, of the stage that sends most",
        ["group", "calls", "GiB"],
        [[group, f"{t['calls']:,}", gib(t["bytes"])] for group, t in f["communication"].items()],
    )


def _time(f: Figures) -> Group:
    t = f["time"]
    rows = {
        "step, s": f"{t['step']:.3f}",
        "products of the busiest stage, s": f"{t['compute']:.3f}",
        "messages of that stage, s": f"{t['messages']:.3f}",
        "pipeline bubble": f"{t['bubble']:.1%}",
        "gradients and parameters of replicas, s": f"{t['data']:.3f}",
        "optimizer, s": f"{t['optimizer']:.3f}",
        "tokens per second": f"{t['tokens_per_second']:,.0f}",
        "tokens per day": quantity(t["tokens_per_day"]),
        "TFLOP/s per GPU": f"{t['flops_per_gpu'] / 1e12:.1f}",
        "MFU": f"{t['mfu']:.1%}",
    }
    if t["days"]:
        rows[f"days for {quantity(f['tokens'])} tokens"] = f"{t['days']:.1f}"
    return table(
        f"Expected on {t['gpu']}: {t['peak_flops'] / 1e12:,.0f} TFLOP/s dense, products at {t['efficiency']:.0%} of it",
        ["", ""],
        [[name, value] for name, value in rows.items()],
    )


def show_fit(found: Figures, console: Console) -> None:
    """Prints proposed layouts; their flags in one line each, however long, to be copied."""
    console.print(Group(*_fit(found)))
    for line in _proposed_flags(found):
        console.print(Text(line), soft_wrap=True)


def _fit(f: Figures) -> Iterable[RenderableType]:
    yield Text(
        f"{f['name']} on {f['gpus']} x {f['gpu']}: {f['fitting']} of {f['tried']} layouts take at most "
        f"{gib(f['limit'])} of {gib(f['memory'])} GiB"
    )
    if not f["proposals"]:
        least = f["least"]
        if least:
            yield Text(f"None fits. The smallest takes {gib(least['bytes'])} GiB:\n  {' '.join(least['flags'])}")
        return
    columns = [
        "",
        "tensor",
        "pipeline",
        "context",
        "expert",
        "data",
        "micro-batch",
        "recompute",
        "GiB",
        "step s",
        "bubble",
        "MFU",
    ]
    yield table(
        "Fastest first, by the model of time that megatron_hybrid/plan/time.py explains",
        [*columns, "tokens per day"],
        [
            [
                str(i),
                *(str(p["layout"][name]) for name in ("tp",)),
                f"{p['layout']['pp']}" + (f" x {p['layout']['vpp']}" if p["layout"]["vpp"] > 1 else ""),
                *(str(p["layout"][name]) for name in ("cp", "ep", "dp", "micro_batch")),
                p["recompute"],
                gib(p["memory"]["total"]),
                f"{p['time']['step']:.3f}",
                f"{p['time']['bubble']:.1%}",
                f"{p['time']['mfu']:.1%}",
                quantity(p["time"]["tokens_per_day"]),
            ]
            for i, p in enumerate(f["proposals"], 1)
        ],
    )


def _proposed_flags(f: Figures) -> Iterable[str]:
    if f["proposals"]:
        yield "Flags to add"
    for i, p in enumerate(f["proposals"], 1):
        more = [str(n) for n in p["micro_batches_that_fit"] if n != p["layout"]["micro_batch"]]
        fits = f"   (micro-batches of {', '.join(more)} fit too)" if more else ""
        yield f"  {i}  {shlex.join(p['flags'])}{fits}"


def _pipeline(f: Figures) -> RenderableType:
    stages = f["pipeline"]["stages"]
    if len(stages) == 1:
        return Text("")
    most = max(stage["share"] for stage in stages)
    return table(
        f"Work of the pipeline stages; the slowest is {f['pipeline']['imbalance']:.3f} times the mean, and stages wait "
        f"{f['pipeline']['bubble']:.1%} of a step's time",
        ["stage", "share", " ", "what it holds"],
        [
            [str(i), f"{s['share']:.1%}", "█" * round(BAR * s["share"] / most), " + ".join([s["layers"], *s["beside"]])]
            for i, s in enumerate(stages)
        ],
    )


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and a letter: 59.9B, 2.10M."""
    if value is None:
        return ""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= 0.9995 * size:  # 999,900 is 1M, not 1e+03K
            return f"{value / size:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def mib(value: float) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:,.1f}"


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:,.2f}"


SHOW = {"run": show, "comparison": show_comparison, "fit": show_fit}
"""By what a plan is about (:data:`megatron_hybrid.plan.request.Kind`)."""
