"""Figures as a picture."""

from pathlib import Path
from typing import Any

from megatron_hybrid import pictures
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan.figures import Figures

OTHER = "#555555"
PARTS = {"parameters": "#4477aa", "gradients": "#66ccee", "optimizer": "#228833", "activations": "#ee6677"}

TIMES = {"compute": "#4477aa", "messages": "#ee6677", "data": "#ccbb44", "optimizer": "#228833", "waiting": "#bbbbbb"}


def plot(f: Figures, path: Path) -> None:
    """Draws where parameters and FLOPs are, the cache, and the memory and work of the pipeline stages."""
    plt = pictures.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    name = "" if f["name"] == f["pattern"] else f"{f['name']}    "
    gpu = f"    {f['layout']['gpus']} x {f['machine']['gpu']}" if "machine" in f else ""
    figure.suptitle(f"{name}{_shortened(f['pattern'])}{gpu}", fontsize=12)
    _parts(axes[0][0], f)
    _cache(axes[0][1], [f])
    _memory(axes[1][0], f)
    _stages(axes[1][1], f)
    pictures.save(figure, path, 120, path.suffix.lstrip("."))


def plot_comparison(found: Figures, path: Path) -> None:
    """Draws parameters, training FLOPs and caches of architectures side by side."""
    plt = pictures.pyplot()
    rows = found["architectures"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.8 + max(3.0, 0.4 * len(rows))), layout="constrained")
    names = [row["name"] for row in rows]
    _bars(axes[0], names, [row["parameters"]["non_embedding"] / 1e9 for row in rows], "all")
    _bars(axes[0], names, [row["parameters"]["active_non_embedding"] / 1e9 for row in rows], "active", 0.4)
    axes[0].set_title("non-embedding parameters, billions")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8)
    if found["match"] == "flops":
        _bars(axes[1], names, [row["tokens"] / 1e9 for row in rows], "")
        axes[1].set_title(f"tokens of equal training FLOPs ({found['convention']}), billions")
    elif all(row["tokens"] for row in rows):
        _bars(axes[1], names, [row["flops"]["paper"]["run"] / 1e20 for row in rows], "")
        axes[1].set_title("training FLOPs (paper), 1e20")
    else:
        _bars(axes[1], names, [row["flops"]["paper"]["per_token"] / 1e9 for row in rows], "")
        axes[1].set_title("training FLOPs per token (paper), 1e9")
    for i, patch in enumerate(axes[1].patches):
        axes[1].text(0, i, f" {patch.get_width():.4g}", va="center", color="white", fontsize=9)
    axes[1].tick_params(labelleft=False)
    _cache(axes[2], rows)
    pictures.save(figure, path, 120, path.suffix.lstrip("."))


def plot_fit(found: Figures, path: Path) -> None:
    """Draws memory and time of the proposed layouts.

    Raises:
        ValueError: There is none.
    """
    if not found["proposals"]:
        raise ValueError("--plot: no layout fits, so there is nothing to draw.")
    plt = pictures.pyplot()
    rows = found["proposals"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.8 + 0.6 * len(rows)), layout="constrained")
    figure.suptitle(f"{found['name']} on {found['gpus']} x {found['gpu']}", fontsize=12)
    names = [_layout(row["layout"]) for row in rows]
    _stack(axes[0], names, {part: [row["memory"][part] / 2**30 for row in rows] for part in PARTS}, PARTS)
    axes[0].axvline(found["limit"] / 2**30, color="black", linestyle="--", linewidth=1, label="limit")
    axes[0].set_title("fullest rank, GiB")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8)
    times = {part: [row["time"][part] for row in rows] for part in ("compute", "messages", "data", "optimizer")}
    waits = [row["time"]["step"] - sum(times[part][i] for part in times) for i, row in enumerate(rows)]
    _stack(axes[1], names, {**times, "waiting": waits}, TIMES)
    axes[1].tick_params(labelleft=False)
    axes[1].set_title("step, seconds (by the model of time)")
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8)
    pictures.save(figure, path, 120, path.suffix.lstrip("."))


def _parts(axes: Any, f: Figures) -> None:
    """Shares of parameters and FLOPs, one stacked bar each."""
    rows = [part for part in f["parts"] if part["parameters"] or part["training_flops_per_token"]]
    bars = {"parameters": "parameters", "active": "active", "training_flops_per_token": "FLOPs per token"}
    totals = {key: sum(part[key] for part in rows) for key in bars}
    starts = dict.fromkeys(bars, 0.0)
    greys = iter(("#555555", "#888888", "#222222"))
    for part in rows:
        share = {key: part[key] / totals[key] for key in bars}
        if max(share.values()) < 0.001:
            continue
        name = part["name"].partition(",")[0]
        label = f"{part['symbol']} x {part['count']}" if part["symbol"] in LAYERS else name
        color = LAYERS[part["symbol"]].color if part["symbol"] in LAYERS else next(greys)
        axes.barh(list(bars.values()), list(share.values()), left=list(starts.values()), color=color, label=label)
        for i, key in enumerate(bars):
            if share[key] > 0.05:
                axes.text(starts[key] + share[key] / 2, i, f"{share[key]:.0%}", ha="center", va="center", color="white")
            starts[key] += share[key]
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_title("shares of parameters and of training FLOPs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8)


def _cache(axes: Any, rows: list[Figures]) -> None:
    for i, row in enumerate(rows):
        line = ("-", "--", ":")[i % 3]  # lines that lie on each other can all be seen
        axes.plot(
            row["cache"]["lengths"],
            [size / 2**20 for size in row["cache"]["total"]],
            linestyle=line,
            marker="o",
            label=row["name"],
        )
    lengths = rows[0]["cache"]["lengths"]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}K" for n in lengths])
    axes.set_xlabel("context, tokens")
    axes.set_title("cache of one sequence, MiB (bf16)")
    axes.grid(alpha=0.3)
    if len(rows) > 1:
        axes.legend(fontsize=8)


def _memory(axes: Any, f: Figures) -> None:
    names = [f"stage {i}" for i in range(len(f["memory"]))]
    _stack(axes, names, {part: [row[part] / 2**30 for row in f["memory"]] for part in PARTS}, PARTS)
    if "machine" in f:
        axes.axvline(f["machine"]["limit"] / 2**30, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_title("memory of the fullest rank, GiB")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8)


def _stages(axes: Any, f: Figures) -> None:
    stages = f["pipeline"]["stages"]
    _bars(axes, [f"stage {i}" for i in range(len(stages))], [100 * stage["share"] for stage in stages], "")
    for i, stage in enumerate(stages):
        axes.text(
            0,
            i,
            f" {_shortened(' + '.join([stage['layers'], *stage['beside']]), 40)}",
            va="center",
            color="white",
            fontsize=9,
            family="monospace",
        )
    axes.axvline(100 / len(stages), color="black", linestyle="--", linewidth=1)
    axes.set_title(f"work of the pipeline stages, % (slowest {f['pipeline']['imbalance']:.2f} x the mean)")


def _bars(axes: Any, names: list[str], values: list[float], label: str, height: float = 0.8) -> None:
    axes.barh(names, values, height=height, label=label, color="#4477aa" if height == 0.8 else "#ee6677")
    if not axes.yaxis_inverted():
        axes.invert_yaxis()


def _stack(axes: Any, names: list[str], parts: dict[str, list[float]], colors: dict[str, str]) -> None:
    start = [0.0] * len(names)
    for part, values in parts.items():
        axes.barh(names, values, left=start, label=part, color=colors[part])
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.invert_yaxis()
    for i, total in enumerate(start):
        axes.text(total, i, f" {total:.3g}", va="center", fontsize=9)
    axes.margins(x=0.1)


def _layout(layout: dict[str, Any]) -> str:
    sizes = {name: layout[name] for name in ("tp", "pp", "vpp", "cp", "ep", "dp") if layout[name] > 1}
    return " ".join(f"{name}{size}" for name, size in sizes.items()) or "one rank each"


def _shortened(text: str, most: int = 70) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


PLOT = {"run": plot, "comparison": plot_comparison, "fit": plot_fit}
"""By what a plan is about (:data:`megatron_hybrid.plan.request.Kind`)."""
