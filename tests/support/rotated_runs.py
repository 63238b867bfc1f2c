"""Layers of attention whose heads come from our kernel, or upstream's way. By Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def by(ours: bool) -> Iterator[list[Any]]:
    """Which way heads go, and what went ours: pairs of ``HeadColumns`` and whether RoPE turned them."""
    from megatron_hybrid.kernels import qkv_rotation
    from megatron_hybrid.layers.attention import rotated_heads
    from tests.support import triton_interpreter

    assert triton_interpreter.interpreted()
    if not hasattr(by, "mended"):
        triton_interpreter.install()
        by.mended = True  # type: ignore[attr-defined]
    went: list[Any] = []
    takes, split = rotated_heads.takes, rotated_heads.split_and_rotate

    def counting(x: Any, heads: Any, turns: Any, copy_values: bool) -> Any:
        assert qkv_rotation.takes(x)
        went.append((tuple(heads), turns is not None))
        return split(x, heads, turns, copy_values)

    rotated_heads.takes = lambda x: ours and takes(x)
    rotated_heads.split_and_rotate = counting
    try:
        yield went
    finally:
        rotated_heads.takes, rotated_heads.split_and_rotate = takes, split


def layer(ours: bool, **case: Any) -> tuple[dict[str, Any], list[Any]]:
    """:func:`tests.support.single.layer`, and what went our way."""
    from tests.support import single

    with by(ours) as went:
        return single.layer(**case), went


def losses(ours: bool, **case: Any) -> tuple[list[tuple[float, float]], list[Any]]:
    """:func:`tests.support.training.losses`, and what went our way."""
    from tests.support import training

    with by(ours) as went:
        return training.losses(**case), went


def kept(ours: bool, pattern: str, flags: str) -> int:
    """Bytes that a layer keeps for its backward pass."""
    from tests.costs import test_activations_measured as measured

    with by(ours) as went:
        ((found, _),) = measured.kept_and_counted_by_layer(pattern, flags)
        assert bool(went) is ours
        return found
