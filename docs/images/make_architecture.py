"""Draws docs/images/architecture.svg: two kinds of hybrid stack, one P layer, and the way from flags to Megatron.

python docs/images/make_architecture.py [FILE.svg | FILE.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

INK, MUTED, PANEL, EDGE = "#1f2933", "#5f6c7b", "#f6f8fa", "#d5dbe2"
ATTENTION, MAMBA, FFN, INTRA, PLAIN = "#f2b8a0", "#a9cdec", "#e3e6ea", "#d3c3ee", "#ffffff"
HEIGHT = 0.44
GAP = 0.14


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "", *, fill: str = PLAIN, **style
) -> None:
    """A rounded box around the point (x, y) with centred text; ``style`` goes to the text."""
    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.07"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=fill, edgecolor=INK, linewidth=0.9))
    ax.text(x, y - 0.01, text, ha="center", va="center", color=INK, **{"fontsize": 10, "linespacing": 1.45, **style})


def panel(ax: Axes, left: float, right: float, bottom: float, top: float, title: str, subtitle: str) -> None:
    """A grey area with a title in its upper left corner."""
    shape = "round,pad=0,rounding_size=0.12"
    area = FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=shape)
    area.set(facecolor=PANEL, edgecolor=EDGE, linewidth=1, zorder=0.8)
    ax.add_patch(area)
    ax.text(left + 0.2, top - 0.28, title, fontsize=11.5, fontweight="bold", color=INK, va="center")
    ax.text(left + 0.2, top - 0.56, subtitle, fontsize=9, color=MUTED, va="center")


def arrow(ax: Axes, *points: tuple[float, float], head: bool = True) -> None:
    """A line through the points, with a head at the last one."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(start, end, strict=True), color=INK, linewidth=1.1, solid_capstyle="round")
    style = "-|>,head_length=4,head_width=2.2" if head else "-"
    ax.add_patch(
        FancyArrowPatch(points[-2], points[-1], arrowstyle=style, color=INK, linewidth=1.1, shrinkA=0, shrinkB=0)
    )


def stack(ax: Axes, x: float, bottom: float, layers: list[tuple[str, str, str]]) -> dict[str, float]:
    """Layers from the first, at the bottom, upwards: (symbol, name, colour). Returns the height of each symbol."""
    places, y = {}, bottom
    for number, (symbol, name, fill) in enumerate(layers):
        box(ax, x, y, 2.0, HEIGHT, name, fill=fill)
        if number:
            arrow(ax, (x, y - HEIGHT / 2 - GAP), (x, y - HEIGHT / 2), head=False)
        if symbol:
            ax.text(x - 1.25, y - 0.01, symbol, family="monospace", fontsize=13, color=INK, ha="center", va="center")
        places.setdefault(symbol, y)
        y += HEIGHT + GAP
    return places


def flow(ax: Axes) -> None:
    """The upper row: from flags to a run, and from the same layers to a plan."""
    y, texts = (
        7.35,
        [
            ("Flags and recipe", "--recipe paper-1b-intra\n--num-blocks 13 --block-ratio 1:5"),
            ("Layer pattern", "M-M-P-M-M-|M-M-P-M-\none character per layer"),
            ("Layers", "registry: symbol → module, account,\nchecks of each layer family"),
            ("Megatron-Core", "HybridModel, pretrain()\nTP · SP · PP · CP · EP · DP"),
        ],
    )
    centres = [1.6, 4.86, 8.12, 11.38]
    for x, (title, text) in zip(centres, texts, strict=True):
        box(ax, x, y, 2.84, 1.0)
        ax.text(x, y + 0.29, title, fontsize=11.5, fontweight="bold", color=INK, ha="center", va="center")
        mono = "monospace" if text.startswith("--") else "sans-serif"
        ax.text(x, y - 0.17, text, fontsize=8.6, family=mono, color=MUTED, ha="center", va="center", linespacing=1.5)
    for left, right in zip(centres[:-1], centres[1:], strict=True):
        arrow(ax, (left + 1.42, y), (right - 1.42, y))
    for x, width, text in (
        (8.12, 2.84, "tools/plan.py, without a GPU:\nparameters, FLOPs, memory, time"),
        (11.38, 2.84, "run folder: verified checkpoints,\nmetrics, logs"),
    ):
        box(ax, x, 6.24, width, 0.6, text, fontsize=8.6)
        arrow(ax, (x, y - 0.5), (x, 6.54))
    ax.text(
        4.86,
        6.5,
        "printed, checked, and saved\nwith each checkpoint",
        fontsize=8.6,
        color=MUTED,
        ha="center",
        va="center",
    )


def stacks(ax: Axes) -> float:
    """The two stacks below on the left; returns the height of the P layer."""
    panel(ax, 0.18, 3.46, 0.2, 5.65, "Inter-layer hybrid", "pattern M-*-M-")
    panel(ax, 3.62, 6.9, 0.2, 5.65, "Intra-layer hybrid", "pattern M-P-M-")
    mamba, ffn = ("M", "Mamba-2", MAMBA), ("-", "FFN", FFN)
    attention, intra = ("*", "attention", ATTENTION), ("P", "attention ∥ Mamba-2", INTRA)
    first, last = ("", "embedding", PLAIN), ("", "output head", PLAIN)
    stack(ax, 2.0, 0.56, [first, mamba, ffn, attention, ffn, mamba, ffn, last])
    places = stack(ax, 5.44, 0.56, [first, mamba, ffn, intra, ffn, mamba, ffn, last])
    return places["P"]


def intra_layer(ax: Axes, place: float) -> None:
    """One P layer on the right, and the lines that enlarge it from the stack."""
    left, right, bottom, top = 7.28, 12.82, 0.2, 5.65
    panel(ax, left, right, bottom, top, "One P layer", "one matrix product in, one out; every choice between is a flag")
    zoom = [(6.44, place + HEIGHT / 2), (left, top - 0.12), (left, bottom + 0.12), (6.44, place - HEIGHT / 2)]
    ax.add_patch(Polygon(zoom, closed=True, facecolor=INTRA, edgecolor="none", alpha=0.45, zorder=0.9))
    x, one, two = 9.85, 8.72, 10.98
    box(ax, x, 1.0, 4.5, 0.44, "norm, input projection:  q k v  |  z x B C dt")
    box(ax, one, 1.94, 1.95, 0.62, "attention\n(full or a window)", fill=ATTENTION, fontsize=9.5)
    box(ax, two, 1.94, 1.95, 0.62, "Mamba-2\n(convolution, scan)", fill=MAMBA, fontsize=9.5)
    for centre in (one, two):
        box(ax, centre, 2.8, 1.95, 0.44, "norm, scale")
        arrow(ax, (centre, 1.22), (centre, 1.63))
        arrow(ax, (centre, 2.25), (centre, 2.58))
    box(ax, x, 3.6, 2.5, 0.44, "fusion:  add, diff, concat", fill=INTRA)
    for centre, entry in ((one, x - 0.62), (two, x + 0.62)):
        arrow(ax, (centre, 3.02), (centre, 3.2), (entry, 3.2), (entry, 3.38))
    box(ax, x, 4.26, 4.5, 0.44, "output projection")
    arrow(ax, (x, 3.82), (x, 4.04))
    ax.add_patch(plt.Circle((x, 4.72), 0.11, facecolor=PLAIN, edgecolor=INK, linewidth=1.1))
    ax.plot([x - 0.06, x + 0.06, x, x, x], [4.72, 4.72, 4.72, 4.66, 4.78], color=INK, linewidth=1.1)
    arrow(ax, (x, 4.48), (x, 4.61))
    arrow(ax, (x, 4.83), (x, 4.98))
    arrow(ax, (x, 0.34), (x, 0.78))
    arrow(ax, (x, 0.52), (12.5, 0.52), (12.5, 4.72), (x + 0.11, 4.72))
    ax.text(12.42, 2.6, "residual", fontsize=9, color=MUTED, rotation=90, ha="right", va="center")


def main() -> None:
    """Draw into the file that is given, or beside this script."""
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("architecture.svg")
    # Text as outlines looks the same everywhere; without a date and with a fixed salt the file is the same each time.
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "architecture"})
    figure = plt.figure(figsize=(13, 8.1), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 13), ylim=(0, 8.1), aspect="equal")
    ax.axis("off")
    flow(ax)
    place = stacks(ax)
    intra_layer(ax, place)
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()
