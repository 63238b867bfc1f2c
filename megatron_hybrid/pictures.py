"""Pictures as files, drawn without a display; matplotlib is imported when it is asked for."""

from pathlib import Path
from typing import Any

from megatron_hybrid.files import atomic_write


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int, kind: str = "png") -> None:
    """Write a figure, there whole or not at all, and let go of it."""
    with atomic_write(path) as stream:
        figure.savefig(stream, format=kind, dpi=dpi)
    pyplot().close(figure)
