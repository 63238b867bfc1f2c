"""Plots of monitored runs: curves and expert loads, in a terminal and as PNG."""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid import pictures
from megatron_hybrid.run_folder.metrics_file import Metrics, balance
from megatron_hybrid.run_folder.progress import Progress

BARS = " ▁▂▃▄▅▆▇█"
COLORS = ["blue+", "orange", "green", "magenta", "cyan", "red", "gray", "green+", "magenta+", "cyan+"]
"""Of the runs in a terminal, as plotext names them; there are ten for matplotlib, too."""
LETTERS = "ABCDEFGHIJ"
"""What draws the runs where there are no colours."""
LEAST = 24
"""Characters that a plot needs in width; a narrower terminal cuts it."""
Items = Iterable[tuple[int, float | None]]


class Curve(NamedTuple):
    """Finite values by iteration."""

    label: str
    run: int
    """Its number, for the colour."""
    iterations: list[int]
    values: list[float]
    dots: bool = False


class Plot(NamedTuple):
    title: str
    curves: list[Curve]
    restarts: list[tuple[int, int]]
    """Number of the run, and the iteration that it resumed from; only those within the curves."""


def plots(runs: list[Progress], last: int | None, points: int) -> list[Plot]:
    """The curves of the runs, each thinned to at most ``points``; empty plots are omitted.

    points: A curve of dots, which would hide others, has an eighth.
    last: Where to begin, counted back from the end of the run that is least far; all runs share an axis.
    """
    first = 0 if last is None else min(run.iteration for run in runs) - last

    def curves(values: Callable[[Metrics], Items], what: str = "") -> list[Curve]:
        found = []
        for number, run in enumerate(runs):
            shown = ((i, v) for i, v in values(run.metrics) if i > first and v is not None and math.isfinite(v))
            thinned = _thinned(list(shown), max(1, points // 8) if what else points)
            found.append(Curve(run.name + what, number, *thinned, dots=bool(what)))
        return [curve for curve in found if curve.values]

    def of_steps(key: str) -> list[Curve]:
        return curves(lambda metrics: ((i, record.get(key)) for i, record in metrics.train.items()))

    experts = curves(lambda m: ((i, max(of.values())) for i, of in m.max_over_mean.items()))
    found = {
        "loss (nats per token)": of_steps("loss") + curves(lambda m: m.validation.items(), " validation"),
        "gradient norm": of_steps("grad_norm"),
        "tokens per second": of_steps("tokens_per_second"),
        "busiest expert / mean, worst layer": experts,
    }
    return [Plot(title, of, _restarts(runs, of)) for title, of in found.items() if of]


def _restarts(runs: list[Progress], curves: list[Curve]) -> list[tuple[int, int]]:
    first, last = extent(curves)
    places = {(number, start["resume"]) for number, run in enumerate(runs) for start in run.metrics.starts[1:]}
    return sorted(place for place in places if first < place[1] < last)


def extent(curves: list[Curve]) -> tuple[int, int]:
    """The first and the last iteration."""
    return min(curve.iterations[0] for curve in curves), max(curve.iterations[-1] for curve in curves)


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
    """Draws one plot as ``height`` lines of ``width`` characters (and colours); dotted lines are restarts."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(width, height)
    low, high = limits(plot.curves)
    first, last = extent(plot.curves)
    for run, place in plot.restarts:
        plotext.plot([place, place], [low, high], marker="┊", **_style(run, color))
    letters = not color and any(curve.run for curve in plot.curves)
    for curve in plot.curves:
        letter = LETTERS[curve.run] if letters else ""
        draw = plotext.scatter if curve.dots or len(curve.values) == 1 else plotext.plot
        marker = (letter.lower() or "x") if curve.dots else letter or ("•" if len(curve.values) == 1 else "braille")
        draw(curve.iterations, curve.values, marker=marker, **_style(curve.run, color))
    plotext.xlim(*((first, last) if first < last else (first - 1, last + 1)))
    plotext.ylim(low, high)
    plotext.yticks(*ticks(low, high, 2 if height < 12 else 3, unit=True))
    plotext.xticks(*(ticks(first, last, 2 if width < 70 else 3) if last - first > 3 else ([last], [f"{last:,}"])))
    key = ", lower case: validation" if letters else ", x: validation"
    plotext.title((plot.title + (key if any(curve.dots for curve in plot.curves) else ""))[:width])
    text = plotext.build()
    return (text if color else plotext.uncolorize(text)).splitlines()


def _style(run: int, color: bool) -> dict[str, str]:
    return {"color": COLORS[run]} if color else {}


def ticks(low: float, high: float, least: int, unit: bool = False) -> tuple[list[float], list[str]]:
    """At least ``least`` (2 or 3) round ticks of an axis, not many more, and their labels: 1,200 or 1.2 k."""
    power = math.floor(math.log10(high - low))
    for step in (base * 10.0 ** (power - less) for less in (0, 1) for base in (5, 2, 1)):
        places = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(places) >= least:
            break
    units = [(1e9, " B"), (1e6, " M"), (1e3, " k")] if unit else []
    size, name = next((found for found in units if high >= found[0]), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return places, [f"{place / size:,.{digits}f}{name}" for place in places]


def terminal_plots(drawn: list[Plot], width: int, height: int, color: bool) -> list[str]:
    """All plots in ``height`` lines: two side by side if there is room, else those that fit."""
    tight = height < 9 * len(drawn)
    columns = 2 if len(drawn) > 1 and (width >= 100 or (width >= 3 * LEAST and tight)) else 1
    rows = math.ceil(len(drawn) / columns)
    fit = rows if height >= 8 * rows else max(1, (height - 1) // 8)
    left_out = len(drawn[fit * columns :])
    each = max(8, min(20, (height - bool(left_out)) // fit))
    lines = []
    for start in range(0, fit * columns, columns):
        cells = [terminal_plot(p, max(LEAST, width // columns), each, color) for p in drawn[start : start + columns]]
        lines += ["".join(parts) for parts in zip(*cells, strict=True)]
    if left_out:
        lines.append(f"no room for {left_out} of {len(drawn)} plots"[:width])
    return lines


def key(run: int, color: bool) -> str:
    """Two characters that say which curves of a terminal's plots are of a run."""
    import plotext

    return plotext.colorize("━━", COLORS[run]) if color else f"{LETTERS[run]} "


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
    """Draws the plots and the first run's expert loads; dotted lines are restarts."""
    plt = pictures.pyplot()

    loads = runs[0].metrics.expert_loads
    count = len(drawn) + bool(loads)
    rows = math.ceil(count / 2)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, 150)]
    height = 0.4 + 0.2 * len(lines) + 3.6 * rows
    with plt.rc_context({"text.parse_math": False}):  # a run's name may have a $
        figure, grid = plt.subplots(rows, min(2, count), figsize=(13, height), layout="constrained", squeeze=False)
        cells = [axes for row in grid for axes in row]
        for axes, plot in zip(cells, drawn, strict=False):
            _draw(axes, plot, legend=len(runs) > 1)
        if loads:
            _draw_loads(figure, cells[len(drawn)], loads, runs[0].name)
        for axes in cells[count:]:
            axes.set_axis_off()
        figure.suptitle("\n".join(lines), fontsize=10)
        pictures.save(figure, path, dpi=100)


def _draw(axes: Any, plot: Plot, legend: bool) -> None:
    for curve in plot.curves:
        style: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.8}
        if curve.dots or len(curve.values) == 1:
            style = {"marker": "o", "markersize": 4, "linestyle": "--", "markeredgecolor": "black"}
        axes.plot(curve.iterations, curve.values, label=curve.label, color=f"C{curve.run}", **style)
    axes.set_ylim(*limits(plot.curves))
    for run, place in plot.restarts:
        axes.axvline(place, color=f"C{run}", linewidth=1, linestyle=":")
    axes.set(title=plot.title, xlabel="iteration")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if plot.title.startswith("tokens"):
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if legend or any(curve.dots for curve in plot.curves):
        axes.legend(fontsize=8)


def _draw_loads(figure: Any, axes: Any, loads: dict[str, list[float]], name: str) -> None:
    """A row for each layer; those with fewer experts than others end early, in grey."""
    experts = max(map(len, loads.values()))
    image = [[s * len(shares) for s in shares] + [math.nan] * (experts - len(shares)) for shares in loads.values()]
    shown = axes.imshow(image, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_facecolor("#808080")
    every = math.ceil(len(loads) / 28)
    axes.set_yticks(range(0, len(loads), every), list(loads)[::every])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=f"{name}: load of each expert / mean, last interval", xlabel="expert", ylabel="layer")
    figure.colorbar(shown, ax=axes, extend="max")
