"""Rows, tables and a picture of what the runs of tools/benchmarks/step.py found."""

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid import pictures
from megatron_hybrid.benchmarks.kernel_classes import CLASSES, OTHER, by_class
from megatron_hybrid.benchmarks.step_runs import OURS, Run

Row = dict[str, Any]

LEGEND = """
step: median (and range) of whole training steps after warm-up: all micro-batches, the optimizer, the line of the log.
MFU: FLOPs / (seconds x GPUs x peak). FLOPs are those of the `model` convention (docs/costs.md): forward and backward of
  the products, of attention's causal half and of the scan's chunks; what is recomputed does not count.
peak GiB: allocated by torch at the worst moment of a rank.
start: seconds from the turn of the process to its first step: model, optimizer, data; without imports.
first step: seconds from the first forward pass to the end of the first step, kernels compiled on the way included.
""".strip()
GPU_LEGEND = """
idle: 1 - (time in which a kernel runs in the profiled step) / (median of the timed steps): the GPU waits for the host.
ms and share of a class: sums over the kernels of the profiled step, known by their names
  (benchmarks/kernel_classes.py); two that run at once count twice.
""".strip()


def row_of(run: Run, found: Row) -> Row:
    """The figures of a run: what it found and what follows from it."""
    row: Row = {"recipe": run.recipe, "arm": run.arm, "flags": shlex.join(run.argv), **found}
    if "error" in found:
        return row
    median = statistics.median(found["seconds"])
    row |= {"median_seconds": median, "tokens_per_second": found["tokens"] / median}
    tflops = found["flops"] / median / found["processes"] / 1e12
    row |= {"tflops_per_gpu": tflops, "mfu": tflops / found["peak_tflops"] if found["peak_tflops"] else None}
    if found["kernels"]:
        row |= {"classes_ms": by_class(found["kernels"]), "idle": max(0.0, 1 - found["busy_ns"] / 1e9 / median)}
    return row


def describe(row: Row) -> str:
    """A run in a few lines, as soon as it has ended."""
    if "error" in row:
        return f"  FAILED: {' '.join(row['error'].split())[:400]}"
    seconds = row["seconds"]
    compiled = [f"{row['compiled']} Triton kernels compiled"] if row["compiled"] else []
    compiled += [f"{row['tuned']} configurations taken from an earlier run"] if row["tuned"] else []
    mfu = (
        f"MFU {row['mfu']:.1%} of {row['peak_tflops']:g} ({row['peak_name']})"
        if row["mfu"]
        else "MFU: no peak is known"
    )
    lines = [
        f"step {row['median_seconds']:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} steps), "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops_per_gpu']:.4g} TFLOP/s, {mfu}",
        f"peak {row['peak_bytes'] / 2**30:.1f} GiB, start {row['start_seconds']:.1f} s, first step "
        f"{row['first_step_seconds']:.1f} s" + (f" ({', '.join(compiled)})" if compiled else ""),
        f"{row['micro_batches']} micro-batches of {row['micro_batch']} x {row['sequence_length']:,} tokens on "
        f"{row['processes']} x {row['device']}, {row['parameters']:,} parameters, backend {row['backend']}",
    ]
    if "ended_badly" in row:
        lines.append(f"the run failed after its timed steps: {' '.join(row['ended_badly'].split())[:400]}")
    if "idle" in row:
        lines.append(
            f"idle {row['idle']:.1%}; the profiled step took {row['profiled_seconds']:.3f} s, kernels "
            f"{row['busy_ns'] / 1e9:.3f} s of it"
        )
    return "\n".join(f"  {line}" for line in lines)


def table(rows: Sequence[Row]) -> str:
    """All runs, a line each, and each arm against ours of the same recipe."""
    good = [row for row in rows if "error" not in row]
    width = max((len(f"{r['recipe']}  {r['arm']}") for r in good), default=0) + 2
    ours = {row["recipe"]: row["median_seconds"] for row in good if row["arm"] == OURS}
    lines = [f"{'':{width}}  step s     MFU  tokens/s  peak GiB  first step s   idle  step / ours"]
    for row in good:
        mfu = f"{row['mfu']:7.1%}" if row["mfu"] else "      -"
        idle = f"{row['idle']:6.1%}" if "idle" in row else "     -"
        ratio = f"{row['median_seconds'] / ours[row['recipe']]:12.3f}" if row["recipe"] in ours else ""
        lines.append(
            f"{row['recipe'] + '  ' + row['arm']:{width}}{row['median_seconds']:8.3f} {mfu}"
            f"{row['tokens_per_second']:10,.0f}{row['peak_bytes'] / 2**30:10.1f}"
            f"{row['first_step_seconds']:14.1f} {idle} {ratio}"
        )
    return "\n".join(lines)


def class_table(rows: Sequence[Row]) -> str:
    """Milliseconds and share of each class of kernels, a column for each run that was profiled."""
    profiled = [row for row in rows if "classes_ms" in row]
    lines = []
    for first in range(0, len(profiled), 4):
        some = profiled[first : first + 4]
        heads = [f"{row['recipe'].removeprefix('paper-')} {row['arm']}"[-22:] for row in some]
        lines.append(f"{'ms of a step':24}" + "".join(f"{head:>24}" for head in heads))
        for label in [*(label for label, _ in CLASSES), OTHER]:
            each = [row["classes_ms"].get(label, 0.0) for row in some]
            if any(each):
                totals = [sum(row["classes_ms"].values()) for row in some]
                cells = [f"{ms:15.1f} {ms / total:7.1%} " for ms, total in zip(each, totals, strict=True)]
                lines.append(f"{label:24}" + "".join(cells))
        lines.append("")
    return "\n".join(lines)


def card(report: dict[str, Any], beside: Sequence[str]) -> str:
    """A report in Markdown: date, hardware, versions, command, results.

    Args:
        beside: Names of files with the same results.
    """
    rows, where = report["rows"], report["environment"]
    versions = ", ".join(f"{name} {text}" for name, text in where.items() if name not in ("date", "gpu"))
    links = ", ".join(f"[{name}]({name})" for name in beside)
    lines = [
        f"# Training steps, {where.get('gpu', report['settings']['device'])}, {where['date']}",
        f"{versions}.",
        f"```sh\n{report['command']}\n```" + (f"\n\n{links}" if links else ""),
        f"```\n{table(rows)}\n```",
    ]
    lines += ["\n".join([f"- **{row['recipe']}, {row['arm']}**", describe(row)]) for row in rows]
    profiled = any("classes_ms" in row for row in rows)
    if profiled:
        lines.append(f"Kernels of one step:\n\n```\n{class_table(rows).rstrip()}\n```")
    lines.append(f"```\n{LEGEND}" + (f"\n{GPU_LEGEND}" if profiled else "") + "\n```")
    return "\n\n".join(lines) + "\n"


def longest(row: Row, count: int) -> str:
    """The kernels of a run that take most of the time."""
    lines = [f"longest kernels of {row['recipe']}, {row['arm']}"]
    for kernel in row["kernels"][:count]:
        lines.append(f"{kernel['ms']:10.1f} ms {kernel['count']:6} x  {kernel['class']:22}  {kernel['name'][:100]}")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """MFU (or tokens/s) of each run, and the classes of its kernels."""
    pyplot = pictures.pyplot()
    rows = [row for row in report["rows"] if "error" not in row]
    profiled = [row for row in rows if "classes_ms" in row]
    columns = 2 if profiled else 1
    figure, axes = pyplot.subplots(1, columns, figsize=(7 * columns, 1.6 + 0.4 * len(rows)), squeeze=False)
    left = axes[0][0]
    known = all(row["mfu"] for row in rows)
    left.barh(
        range(len(rows)),
        [100 * row["mfu"] if known else row["tokens_per_second"] for row in rows],
        color=["C0" if row["arm"] == OURS else "C7" for row in rows],
    )
    left.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    left.set_xlabel(f"MFU, % of {rows[0]['peak_tflops']:g} TFLOP/s" if known else "tokens/s")
    left.invert_yaxis()
    environment = report["environment"]
    left.set_title(environment.get("gpu", environment.get("device", report["settings"]["device"])), fontsize=9)
    if profiled:
        _plot_classes(axes[0][1], profiled)
    figure.tight_layout()
    pictures.save(figure, path, 150, path.suffix.lstrip(".") or "png")


def _plot_classes(ax: Any, rows: Sequence[Row]) -> None:
    """Stacked bars of nanoseconds per token, so that recipes and batches compare."""
    left = [0.0] * len(rows)
    colours = [f"C{i}" for i in range(10)] + ["black", "lightgrey", "gold"]
    for i, label in enumerate([*(label for label, _ in CLASSES), OTHER]):
        widths = [1e6 * row["classes_ms"].get(label, 0.0) * row["processes"] / row["tokens"] for row in rows]
        if any(widths):
            ax.barh(range(len(rows)), widths, left=left, label=label, color=colours[i])
            left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("kernels, ns of a GPU for each token")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _name(row: Row) -> str:
    return row["recipe"] if row["arm"] == OURS else f"{row['recipe']}, {row['arm']}"
