"""What a corpus is on disk: a list of files in a fixed order, and parts and positions in it."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
STANDARD_INPUT = "-"
TEXT_SPLITS = ("file", "line")
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input file, or standard input."""

    path: str
    format: str
    """jsonl, parquet or text."""
    compression: str = ""
    """gzip, zstd, or empty."""
    size: int = 0
    """Bytes on disk; 0 for standard input."""
    mtime_ns: int = 0


@dataclass(frozen=True)
class Segment:
    """A contiguous part of one source: what one shard reads of it."""

    source: Source
    start: int = 0
    end: int | None = None
    """Bytes of an uncompressed file of lines, row groups of a Parquet file; None: to the end."""


class Position(NamedTuple):
    """Where the next document begins."""

    segment: int
    offset: int
    """Bytes of the decompressed segment that are done; rows for Parquet."""
    record: int
    """Lines (rows, files) of the segment that are done."""


class Batch(NamedTuple):
    """Consecutive documents of one segment, not yet parsed."""

    segment: Segment
    first: int
    """Lines (rows) of the segment before this batch."""
    content: Any
    """bytes of whole lines or of one file; list[str | bytes | None] for Parquet rows, a list for each key."""
    end: Position
    """The position after it."""
    read_bytes: int
    """Bytes read from disk for it."""
    size: int = 0
    """Bytes of its content."""
    error: str = ""
    """Why the file cannot be read any further; the batch is then empty."""
    checksum: str = ""
    """Of the segment's bytes on disk, with its last batch."""


def find_sources(inputs: Iterable[str], format: str = "auto") -> tuple[list[Source], list[str]]:
    """List the files of a corpus: in the order of ``inputs``, folders and globs sorted by name.

    inputs: files, globs, folders (with everything below them) or ``-`` for standard input.
    format: ``auto`` infers it from the file's extension; else ``jsonl``, ``parquet`` or ``text``.

    Returns the sources, and the files of folders that were skipped because their extension is unknown.
    Raises ValueError if an input names no file, or a file twice.
    """
    sources: list[Source] = []
    passed_over: list[str] = []
    for name in inputs:
        if name == STANDARD_INPUT:
            sources.append(Source(name, "jsonl" if format == "auto" else format))
            continue
        for path, chosen in _files(name):
            found = _source(path, format)
            if found is None and chosen:
                raise ValueError(
                    f"input {path}: unknown extension; give --input-format jsonl, parquet or text. "
                    f"Known extensions: {', '.join(FORMATS)}, with {', '.join(COMPRESSIONS)} appended."
                )
            if found is None:
                passed_over.append(str(path))
            else:
                sources.append(found)
    if not sources:
        raise ValueError(f"no input file in {', '.join(inputs)}; known extensions: {', '.join(FORMATS)}.")
    seen: set[tuple[int, int]] = set()
    for source in sources:
        identity = _identity(Path(source.path)) if source.path != STANDARD_INPUT else (-1, -1)
        if identity in seen:
            raise ValueError(f"input {source.path} is listed twice: its documents would be there twice. List it once.")
        seen.add(identity)
    return sources, passed_over


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _files(name: str) -> list[tuple[Path, bool]]:
    """The files of one input, and whether each was asked for by name."""
    path = Path(name)
    if not name:
        raise ValueError("an input is empty; give files, folders, globs or - for standard input.")
    if path.is_dir():
        return [(file, False) for file in _below(path)]
    if path.exists() and not path.is_file():
        raise ValueError(f"input {name} is a pipe or a device; give - and connect it to standard input.")
    if path.is_file():
        return [(path, True)]
    matches = sorted(Path(match) for match in glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not matches:
        rule = "matches no file" if glob.has_magic(name) else "does not exist"
        raise ValueError(f"input {name} {rule}; give files, folders, globs or - for standard input.")
    if "**" in name:  # it names what is in its folders itself
        return [(match, True) for match in matches if match.is_file()]
    return [file for match in matches for file in _files(str(match))]


def _below(folder: Path) -> list[Path]:
    """All files below a folder, following links, by name; without hidden ones and what these tools write.

    Raises OSError for a folder that cannot be read, ValueError for a link to nothing or in a circle.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        identity = _identity(Path(name))
        if identity in seen:
            raise ValueError(f"input {name}: a link leads back to a folder that is listed already; remove the link.")
        seen.add(identity)
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(name, file) for file in files if not file.startswith(".")):
            if not path.exists():
                raise ValueError(f"input {path} is a link to nothing; remove it, or mount what it points to.")
            ours = path.name.endswith(".skipped.jsonl") or path.suffix == ".json" and path.with_suffix(".idx").exists()
            if path.is_file() and not ours:
                found.append(path)
    return sorted(found)


def _source(path: Path, format: str) -> Source | None:
    compression = COMPRESSIONS.get(path.suffix, "")
    ending = path.with_suffix("").suffix if compression else path.suffix
    kind = FORMATS.get(ending) if format == "auto" else format
    if kind is None:
        return None
    if kind == "parquet" and compression:
        raise ValueError(f"input {path}: Parquet files have their own compression; decompress this one first.")
    status = path.stat()
    return Source(str(path), kind, compression, status.st_size, status.st_mtime_ns)
