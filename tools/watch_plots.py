"""What watch_run.py draws: curves and expert loads of runs, in a terminal and as PNG."""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid.data.files import atomic_write
from megatron_hybrid.run_folder.metrics import Metrics, balance
from megatron_hybrid.run_folder.progress import Progress

BARS = " ▁▂▃▄▅▆▇█"
COLORS = ["blue+", "orange+", "green+", "red+", "magenta+", "cyan+"]
Items = Iterable[tuple[int, float | None]]


class Curve(NamedTuple):
    """Finite values by iteration."""

    label: str
    color: int
    """Of the run."""
    iterations: list[int]
    values: list[float]
    dots: bool = False


class Plot(NamedTuple):
    title: str
    curves: list[Curve]


def plots(runs: list[Progress], last: int | None, points: int) -> list[Plot]:
    """The curves of the runs, each thinned to at most so many points; plots that would be empty are left out.

    last: Where to begin, counted back from the end of the run that is least far; all runs share an axis.
    """
    first = 0 if last is None else min(run.iteration for run in runs) - last

    def curves(values: Callable[[Metrics], Items], what: str = "") -> list[Curve]:
        found = []
        for color, run in enumerate(runs):
            shown = ((i, v) for i, v in values(run.metrics) if i > first and v is not None and math.isfinite(v))
            found.append(Curve(run.name + what, color, *_thinned(list(shown), points), bool(what)))
        return [curve for curve in found if curve.values]

    def of_steps(key: str) -> list[Curve]:
        return curves(lambda metrics: ((i, record.get(key)) for i, record in metrics.train.items()))

    found = [
        Plot("loss (nats per token)", of_steps("loss") + curves(lambda m: m.validation.items(), " validation")),
        Plot("gradient norm", of_steps("grad_norm")),
        Plot("tokens per second", of_steps("tokens_per_second")),
        Plot(
            "busiest expert / mean, worst layer",
            curves(lambda m: ((i, max(of.values())) for i, of in m.max_over_mean.items())),
        ),
    ]
    return [plot for plot in found if plot.curves]


def _thinned(items: list[tuple[int, float]], points: int) -> tuple[list[int], list[float]]:
    """Means of neighbours where there are more than ``points``."""
    size = math.ceil(len(items) / points) or 1
    bins = [items[i : i + size] for i in range(0, len(items), size)]
    return [part[-1][0] for part in bins], [statistics.fmean(v for _, v in part) for part in bins]


def limits(curves: list[Curve]) -> tuple[float, float]:
    """Of the axis: all values, but for the highest fiftieth where these would flatten the rest."""
    values = sorted(v for curve in curves for v in curve.values)
    low, most, high = values[0], values[round(0.98 * (len(values) - 1))], values[-1]
    if high - low > 3 * (most - low) > 0:
        high = most + 0.2 * (most - low)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


# Terminal --------------------------------------------------------------------------------------------


def terminal_plot(plot: Plot, width: int, height: int, color: bool) -> list[str]:
    """Draws one plot as ``height`` lines of ``width`` characters (and colours)."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(width, height)
    for curve in plot.curves:
        style = {"color": COLORS[curve.color % len(COLORS)]} if color else {}
        label = curve.label if len(plot.curves) > 1 else None
        draw = plotext.scatter if curve.dots or len(curve.values) == 1 else plotext.plot
        draw(curve.iterations, curve.values, marker="x" if curve.dots else "braille", label=label, **style)
    low, high = limits(plot.curves)
    plotext.ylim(low, high)
    plotext.yticks(*ticks(low, high, max(2, min(5, height // 3))))
    first, last = (pick(i for curve in plot.curves for i in curve.iterations) for pick in (min, max))
    places = sorted({round(x) for x in _spread(first, last, max(2, min(5, width // 16)))})
    plotext.xticks(places, [f"{x:,}" for x in places])
    plotext.title(plot.title)
    text = plotext.build()
    return (text if color else plotext.uncolorize(text)).splitlines()


def ticks(low: float, high: float, count: int) -> tuple[list[float], list[str]]:
    """Places on an axis and what stands there, with as many digits as tell them apart."""
    places = _spread(low, high, count)
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if high >= s), (1.0, ""))
    digits = max(0, math.ceil(-math.log10((places[1] - places[0]) / size)))
    return places, [f"{place / size:.{digits}f}{unit}" for place in places]


def _spread(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def terminal_plots(drawn: list[Plot], width: int, height: int, color: bool) -> str:
    """All plots in ``height`` lines: two beside each other where there is room, else those that fit."""
    columns = 2 if width >= 100 and len(drawn) > 1 else 1
    rows = math.ceil(len(drawn) / columns)
    fit = max(1, min(rows, height // 8))
    each = max(8, min(20, height // fit))
    lines = []
    for start in range(0, fit * columns, columns):
        cells = [terminal_plot(p, width // columns, each, color) for p in drawn[start : start + columns]]
        for parts in zip(*cells, strict=False):
            lines.append("".join(parts))
    return "\n".join(lines)


def load_lines(run: Progress, width: int, height: int) -> list[str]:
    """The share of tokens of each expert, a line for each layer: full height is twice the mean; then how uneven."""
    loads = run.metrics.expert_loads
    if not loads or height < 2:
        return []
    names = max(len(f"layer {layer}") for layer in loads)
    room = max(8, width - names - 32)
    lines = [f"{'expert loads':<{names}}  max/mean  entropy  experts in order; full height: twice the mean"]
    uneven = sorted(loads, key=lambda layer: -max(loads[layer]) * len(loads[layer]))
    shown = set(uneven[: height - 1 if len(loads) < height else height - 2])
    for layer, shares in loads.items():
        if layer in shown:
            found = balance(shares)
            bars = "".join(BARS[min(8, round(4 * v))] for v in _grouped([s * len(shares) for s in shares], room))
            lines.append(f"{f'layer {layer}':<{names}}  {found.max_over_mean:8.2f}  {found.entropy:7.3f}  {bars}")
    if len(shown) < len(loads):
        lines.append(f"{len(loads) - len(shown)} layers that are more even are left out")
    return [line[:width] for line in lines]


def _grouped(values: list[float], room: int) -> list[float]:
    """The largest of neighbours, where there are more values than room: a busy expert must show."""
    size = math.ceil(len(values) / room)
    return [max(values[i : i + size]) for i in range(0, len(values), size)]


# PNG -------------------------------------------------------------------------------------------------


def png(runs: list[Progress], drawn: list[Plot], title: str, path: Path) -> None:
    """Draws the plots and the first run's expert loads; grey lines are its restarts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = runs[0].metrics.expert_loads
    count = len(drawn) + bool(loads)
    rows = math.ceil(count / 2)
    figure, grid = plt.subplots(rows, min(2, count), figsize=(13, 1 + 3.6 * rows), layout="constrained", squeeze=False)
    cells = [axes for row in grid for axes in row]
    for axes, plot in zip(cells, drawn, strict=False):
        _draw(axes, plot, runs[0])
    if loads:
        _draw_loads(figure, cells[len(drawn)], loads)
    for axes in cells[count:]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=100)
    plt.close(figure)


def _draw(axes: Any, plot: Plot, run: Progress) -> None:
    for curve in plot.curves:
        style: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.8}
        if curve.dots or len(curve.values) == 1:
            style = {"marker": "o", "markersize": 4, "linestyle": "--", "markeredgecolor": "black"}
        axes.plot(curve.iterations, curve.values, label=curve.label, color=f"C{curve.color % 10}", **style)
    axes.set_ylim(*limits(plot.curves))
    first, last = axes.get_xlim()
    for start in run.metrics.starts[1:]:
        if first < start["resume"] < last:
            axes.axvline(start["resume"], color="#999999", linewidth=0.8, linestyle=":")
    axes.set(title=plot.title, xlabel="iteration")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if plot.title.startswith("tokens"):
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if len(plot.curves) > 1:
        axes.legend(fontsize=8)


def _draw_loads(figure: Any, axes: Any, loads: dict[str, list[float]]) -> None:
    image = [[share * len(shares) for share in shares] for shares in loads.values()]
    shown = axes.imshow(image, aspect="auto", cmap="viridis", vmin=0, vmax=2, interpolation="nearest")
    every = math.ceil(len(loads) / 28)
    axes.set_yticks(range(0, len(loads), every), list(loads)[::every])
    axes.set(
        title="load of each expert / mean, last interval", xlabel="expert", ylabel="layer", xlim=(-0.5, experts - 0.5)
    )
    figure.colorbar(shown, ax=axes, extend="max")
