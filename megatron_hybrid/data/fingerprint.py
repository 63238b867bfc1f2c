"""The identity of a data set's content, independent of the location and name of its files."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.files import checksum, checksum_text

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class Fingerprint(NamedTuple):
    """Of a data set's two files."""

    content: str
    """Of the whole index, the size of PREFIX.bin, and bytes at 16 places of it: all of a file up to 1 MiB."""
    order: str
    """Checksum of PREFIX.idx, as manifests have it. The order in which Megatron draws documents follows from it."""


def fingerprint(prefix: Path) -> Fingerprint:
    """Return the fingerprint of a data set; it reads PREFIX.idx and at most 1 MiB of PREFIX.bin."""
    index, path = checksum(idx_path(prefix)), bin_path(prefix)
    size = path.stat().st_size
    state = xxhash.xxh3_128(f"{index} {size}".encode())
    last = max(0, size - _SAMPLE_BYTES)
    with path.open("rb") as stream:
        for at in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
            stream.seek(at)
            state.update(stream.read(_SAMPLE_BYTES))
    return Fingerprint(checksum_text(state), index)


def first_twins(prefixes: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two prefixes that name one data set, or copies of one; None if all differ.

    Only data sets whose files have the same sizes are read.
    """
    sizes: dict[tuple[int, int], list[str]] = {}
    for prefix in prefixes:
        files = (idx_path(Path(prefix)), bin_path(Path(prefix)))
        sizes.setdefault((files[0].stat().st_size, files[1].stat().st_size), []).append(prefix)
    for alike in sizes.values():
        seen: dict[str, str] = {}
        for prefix in alike if len(alike) > 1 else []:
            content = fingerprint(Path(prefix)).content
            if content in seen:
                return seen[content], prefix
            seen[content] = prefix
    return None
