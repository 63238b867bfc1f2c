"""Files: there whole or not at all, on disk when it is said so, and known by their checksums."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its name when the block ends without error.

    The data are on disk before the name is: a crash leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            to_disk(stream)
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Return the name under which ``path`` is written; processes do not share one."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_directory(path: Path) -> None:
    """Bring renames in a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_disk(stream: BinaryIO) -> None:
    """Flush a file and bring it to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending behind its first ``size`` bytes; raises ValueError if it has fewer."""
    stream = path.open("r+b" if path.exists() else "w+b")
    if path.stat().st_size < size:
        stream.close()
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, fewer than the {size:,} that were noted.")
    stream.truncate(size)
    stream.seek(size)
    return stream


def checksum(path: Path, start: int = 0, end: int | None = None) -> str:
    """Return ``xxh3_128:...`` of a file, or of its bytes from ``start`` to ``end``, in the digits of xxh128sum."""
    state = xxhash.xxh3_128()
    left = path.stat().st_size - start if end is None else end - start
    with path.open("rb") as stream:
        stream.seek(start)
        while left > 0 and (piece := stream.read(min(1 << 22, left))):
            state.update(piece)
            left -= len(piece)
    return checksum_text(state)


def checksum_text(state: Any) -> str:
    """Return the checksum that an ``xxhash.xxh3_128`` has come to, as manifests have it."""
    return f"xxh3_128:{state.hexdigest()}"
