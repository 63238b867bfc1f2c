"""The range of a data set's token ids, and whether a vocabulary has them all."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 22
"""Ids that are read at a time."""


class Range(NamedTuple):
    """The least and the greatest of some token ids."""

    least: int
    greatest: int

    def fault(self, size: int) -> str:
        """Return what is wrong with such ids for a vocabulary of ``size``, as a phrase; empty if nothing is."""
        if self.least >= 0 and self.greatest < size:
            return ""
        return f"ids from {self.least:,} to {self.greatest:,}, but the vocabulary has {size:,}"


def range_of(ids: np.ndarray) -> Range | None:
    """Return the range of some ids; None if there are none."""
    return Range(int(ids.min()), int(ids.max())) if ids.size else None


def union(ranges: Iterable[Range | None]) -> Range | None:
    """Return the range of all ids in several ranges; None for those of no ids."""
    known = [found for found in ranges if found is not None]
    return Range(min(r.least for r in known), max(r.greatest for r in known)) if known else None


def scan(
    path: Path,
    dtype: np.dtype,
    part: int = 0,
    parts: int = 1,
    each: Callable[[np.ndarray], object] = lambda ids: None,
) -> Range | None:
    """Read a PREFIX.bin, or one of ``parts`` about equal parts of it, and return the range of its ids.

    each: is called with every block of ids, ``[ids]``, in order.
    """
    count = path.stat().st_size // dtype.itemsize
    at, end = count * part // parts, count * (part + 1) // parts
    found: Range | None = None
    with path.open("rb") as stream:
        stream.seek(at * dtype.itemsize)
        while at < end:
            ids = np.fromfile(stream, dtype=dtype, count=min(_BLOCK, end - at))
            if not len(ids):
                raise ValueError(f"{path} became shorter while it was read; start again.")
            found = union((found, range_of(ids)))
            at += len(ids)
            each(ids)
    return found
