"""What a corpus is on disk: a list of files in a fixed order, and the parts and places of it that others speak of."""

import glob
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
    error: str = ""
    """Why the file cannot be read any further; the batch is then empty."""
    checksum: str = ""
    """Of the segment's bytes on disk, with its last batch."""


def find_sources(inputs: Iterable[str], format: str = "auto") -> tuple[list[Source], list[str]]:
    """List the files of a corpus: in the order of ``inputs``, folders and globs sorted by name.

    inputs: files, globs, folders (with everything below them) or ``-`` for standard input.
    format: ``auto`` goes by the file's ending; ``jsonl``, ``parquet`` or ``text`` is taken as said.

    Returns the sources, and the files of folders that were passed over because their ending says nothing.
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
                    f"input {path}: its ending does not say what it is; give --input-format jsonl, parquet or text. "
                    f"Known endings: {', '.join(FORMATS)}, with {', '.join(COMPRESSIONS)} behind them."
                )
            if found is None:
                passed_over.append(str(path))
            else:
                sources.append(found)
    if not sources:
        raise ValueError(f"no input file in {', '.join(inputs)}; known endings: {', '.join(FORMATS)}.")
    seen: set[str] = set()
    for source in sources:
        if source.path in seen:
            raise ValueError(f"input {source.path} is listed twice: its documents would be there twice. List it once.")
        seen.add(source.path)
    return sources, passed_over


def _files(name: str) -> list[tuple[Path, bool]]:
    """The files of one input, and whether each was asked for by name."""
    path = Path(name)
    if path.is_dir():
        return [(p, False) for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    if path.is_file():
        return [(path, True)]
    matches = sorted(Path(match) for match in glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    files = [(match, True) for match in matches if match.is_file()]
    if not files:
        rule = "matches no file" if glob.has_magic(name) else "does not exist"
        raise ValueError(f"input {name} {rule}; give files, folders, globs or - for standard input.")
    return files


def _source(path: Path, format: str) -> Source | None:
    compression = COMPRESSIONS.get(path.suffix, "")
    ending = path.with_suffix("").suffix if compression else path.suffix
    kind = FORMATS.get(ending) if format == "auto" else format
    if kind is None:
        return None
    if kind == "parquet" and compression:
        raise ValueError(f"input {path}: Parquet files hold their own compression; decompress this one first.")
    status = path.stat()
    return Source(str(path), kind, compression, status.st_size, status.st_mtime_ns)
