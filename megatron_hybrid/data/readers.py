"""Readers of text corpora: JSON lines, one document a line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Chunk(NamedTuple):
    """Consecutive raw lines of one file, the unit of work of a tokenizing process."""

    path: Path
    first_line: int
    """Number of the first line, counted from 1."""
    lines: list[bytes]


def read_chunks(paths: Iterable[Path], chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """Yield the lines of ``paths``, in order, in chunks of about ``chunk_bytes``, not yet parsed.

    Raises ValueError if a path is not a readable file.
    """
    for path in paths:
        require_file(path)
        first, number, size = 1, 0, 0
        lines: list[bytes] = []
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                lines.append(line)
                size += len(line)
                if size >= chunk_bytes:
                    yield Chunk(path, first, lines)
                    first, size, lines = number + 1, 0, []
        if lines:
            yield Chunk(path, first, lines)


def texts_of(chunk: Chunk, key: str) -> list[str]:
    """Return the string under ``key`` of each line of a chunk; blank lines are passed over.

    Raises ValueError, with file and line, if a line is not a JSON object with such a string.
    """
    texts = []
    for number, line in enumerate(chunk.lines, chunk.first_line):
        if line.strip():
            texts.append(parse_line(line, key, f"{chunk.path}:{number}"))
    return texts


def parse_line(line: bytes, key: str, where: str) -> str:
    """Return the string under ``key`` of one JSON line; ``where`` is named in the ValueError."""
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or UnicodeDecodeError for bytes not in UTF-8
        raise ValueError(f"{where}: not valid JSON ({error}). Every line has to be one JSON object in UTF-8.") from None
    if not isinstance(record, dict):
        raise ValueError(
            f'{where}: the line is a JSON {type(record).__name__}, not an object such as {{"{key}": "..."}}.'
        )
    if key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise ValueError(
            f'{where}: no key "{key}" (the line has: {keys}). Name the key that holds the text with --json-key.'
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f'{where}: the value of "{key}" is a {type(text).__name__}, but a document is a string.')
    return text


def read_texts(paths: Iterable[Path], key: str) -> Iterator[str]:
    """Yield the documents of JSON-lines files one by one; raises ValueError as texts_of does."""
    for chunk in read_chunks(paths):
        yield from texts_of(chunk, key)


def require_file(path: Path) -> None:
    """Raise ValueError if ``path`` is not a file."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ValueError(f"input {path} {what}; give a file of JSON lines.")
