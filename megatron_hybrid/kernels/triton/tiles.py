"""Loads and stores of tiles [rows, columns], and strides for wide loads."""

import triton
import triton.language as tl
from torch import Tensor


def strides_in_loads(*tensors: Tensor) -> tuple[int, list[int]]:
    """ALIGNED, the elements that one load of 16 bytes at most may take, and strides in units of it.

    They are those of batch and token of each tensor [b, s, ...]; ALIGNED divides them all. A kernel that multiplies
    them by this constant lets Triton know how wide loads may be.
    """
    most = 16 // max(t.element_size() for t in tensors)
    strides = [n for t in tensors for n in t.stride()[:2]]
    aligned = next(n for n in (most, most // 2, most // 4, 1) if n and all(stride % n == 0 for stride in strides))
    return aligned, [n // aligned for n in strides]


@triton.jit
def load_tile(base, stride, i, j, rows, columns, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """Rows ``i`` and columns ``j`` from ``base`` on; zero from row ``rows`` or column ``columns`` on.

    Offsets in a tile are 32-bit: 64-bit ones, as masks, cost registers.
    """
    at = base + i[:, None] * stride + j[None, :]
    if ALL_ROWS and ALL_COLUMNS:
        tile = tl.load(at)
    elif ALL_COLUMNS:
        tile = tl.load(at, mask=(i < rows)[:, None], other=0.0)
    elif ALL_ROWS:
        tile = tl.load(at, mask=(j < columns)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(base, stride, i, j, rows, columns, tile, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """Stores what :func:`load_tile` would load."""
    at = base + i[:, None] * stride + j[None, :]
    value = tile.to(base.dtype.element_ty)
    if ALL_ROWS and ALL_COLUMNS:
        tl.store(at, value)
    elif ALL_COLUMNS:
        tl.store(at, value, mask=(i < rows)[:, None])
    elif ALL_ROWS:
        tl.store(at, value, mask=(j < columns)[None, :])
    else:
        tl.store(at, value, mask=(i < rows)[:, None] & (j < columns)[None, :])
