"""Layers of experts whose tokens go the way of patches/experts.py, or upstream's. By Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def by(ours: bool) -> Iterator[list[int]]:
    """Which way tokens go, and the numbers of rows that went ours."""
    from megatron_hybrid.kernels import expert_rows
    from megatron_hybrid.patches import experts
    from tests.support import triton_interpreter

    assert triton_interpreter.interpreted()
    if not hasattr(by, "mended"):
        triton_interpreter.install()
        by.mended = True  # type: ignore[attr-defined]
    rows: list[int] = []
    decides, permute = experts.can_run, expert_rows.permute

    def counting(*args: Any) -> Any:
        rows.append(args[3])
        return permute(*args)

    experts.can_run = lambda x: ours
    expert_rows.permute = counting
    try:
        yield rows
    finally:
        experts.can_run, expert_rows.permute = decides, permute


def layer(ours: bool, **case: Any) -> tuple[dict[str, Any], list[int]]:
    """:func:`tests.support.single.layer`, and the rows that went our way."""
    from tests.support import single

    with by(ours) as rows:
        return single.layer(**case), rows


def losses(ours: bool, **case: Any) -> tuple[list[tuple[float, float]], list[int]]:
    """:func:`tests.support.training.losses`, and the rows that went our way."""
    from tests.support import training

    with by(ours) as rows:
        return training.losses(**case), rows
