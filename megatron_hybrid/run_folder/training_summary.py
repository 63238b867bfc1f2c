"""A run in a few lines and a picture: what was trained, and how the loss went."""

import statistics
from pathlib import Path
from typing import Any

from megatron_hybrid import pictures
from megatron_hybrid.run_folder.metrics_file import Metrics, Record


def summary(run_dir: Path, metrics: Metrics, info: Record) -> str:
    """Return the lines that describe a run; what the records lack is left out."""
    train = list(metrics.train.values())
    rows = [("recipe", info.get("recipe")), ("pattern", info.get("pattern"))]
    rows.append(("parameters", _parameters(info)))
    rows.append(("iterations", f"{train[-1]['iteration']:,}"))
    rows.append(("tokens seen", _number(train[-1].get("tokens"))))
    rows.append(("train loss", _first_last({i: r["loss"] for i, r in metrics.train.items()})))
    rows.append(("validation loss", _first_last(metrics.validation)))
    # The first steps allocate and compile; the median keeps them and other pauses out.
    speed = _median(train, "tokens_per_second")
    rows.append(("tokens per second", None if speed is None else _number(round(speed))))
    rows.append((f"TFLOP/s per {'GPU' if info.get('device') == 'cuda' else 'rank'}", _utilisation(train)))
    rows.append(("peak memory", _peak_memory(train)))
    if info.get("processes") and info.get("device"):
        rows.append(("processes", f"{info['processes']} on {info['device']}"))
    return "\n".join(f"  {name:<18} {value}" for name, value in rows if value not in (None, ""))


def places(run_dir: Path, curve: Path) -> str:
    """Return the lines that say where a run's files are."""
    tracker = run_dir / "latest_checkpointed_iteration.txt"
    rows = [("metrics", run_dir / "metrics.jsonl"), ("loss curve", curve)]
    if tracker.is_file():
        name = tracker.read_text().strip()
        checkpoint = run_dir / (f"iter_{int(name):07d}" if name.isdigit() else name)
        rows.append(("checkpoint", checkpoint))
    return "\n".join(f"  {name:<18} {path}" for name, path in rows)


def draw(metrics: Metrics, title: str, path: Path) -> None:
    """Draw the training and validation loss over the iterations as a PNG."""
    plt = pictures.pyplot()

    figure, axes = plt.subplots(figsize=(8, 4.5))
    losses = [record["loss"] for record in metrics.train.values()]
    axes.plot(list(metrics.train), losses, color="tab:blue", linewidth=1, label="train")
    if metrics.validation:
        iterations, values = list(metrics.validation), list(metrics.validation.values())
        axes.plot(iterations, values, color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    pictures.save(figure, path, dpi=120)


def _median(records: list[Record], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key)]
    return statistics.median(values) if values else None


def _utilisation(records: list[Record]) -> str | None:
    """TFLOP/s, and MFU against the peak of the last record that states one."""
    tflops, stated = _median(records, "tflops_per_gpu"), [record for record in records if record.get("mfu")]
    if tflops is None:
        return None
    text = f"{tflops:.1f}" if tflops >= 10 else f"{tflops:.3g}"
    if not stated:
        return text
    peak, name = stated[-1]["peak_tflops"], stated[-1]["peak_name"]
    mfu = _median([record for record in stated if record["peak_tflops"] == peak], "mfu")
    return f"{text}, MFU {mfu:.1%} of {peak:g} ({name})"


def _peak_memory(records: list[Record]) -> str | None:
    """The largest of any rank: torch's allocator, or the whole process on the CPU engine."""
    for key, what in (("peak_memory_bytes", "a GPU"), ("peak_resident_bytes", "a process")):
        sizes = [record[key] for record in records if record.get(key)]
        if sizes:
            return f"{max(sizes) / 2**30:.1f} GiB of {what}"
    return None


def _parameters(info: Record) -> str | None:
    total, active = info.get("parameters_total"), info.get("parameters_active")
    if total is None:
        return None
    return _number(total) + ("" if active is None else f" in all, {_number(active)} active")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "" if value is None else str(value)


def _first_last(values: dict[int, float]) -> str | None:
    if not values:
        return None
    (first, start), (last, end) = list(values.items())[0], list(values.items())[-1]
    if first == last:
        return f"{end:.3f} (iteration {last:,})"
    return f"{start:.3f} (iteration {first:,}) -> {end:.3f} (iteration {last:,})"
