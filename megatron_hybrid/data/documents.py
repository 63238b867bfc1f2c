"""From raw batches to texts: parsing, and what is wrong with a document, in words."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

from megatron_hybrid.data.batches import read_batches
from megatron_hybrid.data.parquet import open_parquet
from megatron_hybrid.data.sources import STANDARD_INPUT, Batch, Segment

_BOM = b"\xef\xbb\xbf"


class Fault(NamedTuple):
    """A record that is not a document, or a file that cannot be read further."""

    path: str
    record: int
    """Number of the line or row, from 1; of the last one that was read where the file itself is at fault."""
    reason: str
    unit: str = "line"
    """line or row."""

    def __str__(self) -> str:
        return (
            f"{self.path}:{self.record}: {self.reason}"
            if self.unit == "line"
            else (f"{self.path}, row {self.record}: {self.reason}")
        )


class BadRecord(ValueError):
    """Why one record is not a document."""


def parse(
    batch: Batch, keys: list[str], text_split: str = "file", stop: bool = False
) -> tuple[list[list[str]], list[Fault]]:
    """Return the texts of a batch, a list for each key, and its faults; with ``stop`` only up to the first fault.

    A record with a fault is dropped under every key; blank lines are skipped. Line numbers are
    those of the file.
    """
    source = batch.segment.source
    texts: list[list[str]] = [[] for _ in keys]
    faults: list[tuple[int, str]] = []
    if batch.error:
        faults.append((batch.first, f"{batch.error}; what follows is lost"))
    elif source.format == "parquet":
        _parse_rows(batch.content or [], texts, faults, keys, batch.first)
    elif source.format == "text":
        _parse_text(_content(batch), texts, faults, text_split, batch.first)
    else:
        _parse_lines(_content(batch), texts, faults, keys, batch.first, stop)
    if not faults:
        return texts, []
    before = _records_before(batch.segment)
    unit = "row" if source.format == "parquet" else "line"
    name = "standard input" if source.path == STANDARD_INPUT else source.path
    return texts, [Fault(name, before + number, reason, unit) for number, reason in faults]


def read_texts(
    segments: list[Segment], key: str, text_split: str = "file", progress: Callable[[int], object] | None = None
) -> Iterator[str]:
    """Yield the documents of a corpus one by one; raises ValueError at the first fault.

    progress: called with the bytes that were read from disk for each batch.
    """
    for batch in read_batches(segments, [key], text_split):
        texts, faults = parse(batch, [key], text_split, stop=True)
        if faults:
            raise ValueError(str(faults[0]))
        if progress is not None:
            progress(batch.read_bytes)
        yield from texts[0]


def _content(batch: Batch) -> bytes:
    start = batch.first == 0 and batch.segment.start == 0
    return batch.content.removeprefix(_BOM) if start else batch.content


def _parse_lines(
    content: bytes, texts: list[list[str]], faults: list[tuple[int, str]], keys: list[str], first: int, stop: bool
) -> None:
    only = keys[0] if len(keys) == 1 else None
    loads, add = orjson.loads, texts[0].append

    def add_all(values: list[str]) -> None:
        for column, value in zip(texts, values, strict=True):
            column.append(value)

    for number, line in enumerate(content.split(b"\n"), first + 1):
        try:
            try:
                record = loads(line)
            except ValueError as error:
                if not line or line.isspace():
                    continue
                record = _load_leniently(line, error)
                add_all([text_in(record, key) for key in keys])
                continue
            if only is not None and type(record) is dict and only in record:  # the common case, and the fastest
                text = record[only]
                if type(text) is str and "\0" not in text:
                    add(text)  # orjson takes no half surrogates
                    continue
            add_all([text_in(record, key) for key in keys])
        except BadRecord as error:
            faults.append((number, str(error)))
            if stop:
                return


def text_of(line: bytes, key: str) -> str:
    """Return the string under ``key`` of one JSON line, as :func:`text_in`."""
    try:
        record = orjson.loads(line)
    except ValueError as error:
        record = _load_leniently(line, error)
    return text_in(record, key)


def text_in(record: Any, key: str) -> str:
    """Return the string under ``key`` of a JSON value.

    key: a name, or names with dots between them for objects inside objects; a name that has dots itself comes first.
    Raises BadRecord with the reason if there is none.
    """
    if not isinstance(record, dict):
        raise BadRecord(f'the line is a JSON {_json_type(record)}, not an object such as {{"{key}": "..."}}.')
    value = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise BadRecord(
                f'no key "{key}" (the line has: {_names(value)}). Name the one with the text with --text-key.'
            )
        value = value[name]
    if not isinstance(value, str):
        raise BadRecord(f'the value of "{key}" is of JSON type {_json_type(value)}, but a document is a string.')
    return check_text(value)


def _names(value: object, most: int = 10) -> str:
    if not isinstance(value, dict):
        return _json_type(value)
    names = [name[:40] for name in sorted(value)]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "none"


def check_text(text: str) -> str:
    """Return ``text``; raises BadRecord if it contains a null character or half a surrogate pair."""
    if "\0" in text:
        raise BadRecord("the text contains a null character (U+0000).")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRecord("the text contains half a surrogate pair, which is not a Unicode character.") from None
    return text


def _load_leniently(line: bytes, error: ValueError) -> Any:
    """What Python's own json makes of a line that orjson refused; raises BadRecord with the reason if nothing."""
    reason = str(error).partition(": line 1")[0]
    if b"\0" in line:
        raise BadRecord(f"null byte at byte {line.index(0) + 1} of the line; a corrupt file?")
    try:
        return json.loads(line.decode())  # Python's json writes NaN and Infinity, and reads them
    except UnicodeDecodeError as fault:
        raise BadRecord(f"not valid UTF-8 at byte {fault.start + 1} of the line.") from None
    except (ValueError, RecursionError):
        raise BadRecord(f"not valid JSON ({reason}). Every line has to be one JSON object in UTF-8.") from None


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _parse_text(content: bytes, texts: list[list[str]], faults: list[tuple[int, str]], split: str, first: int) -> None:
    parts = [content] if split == "file" else content.split(b"\n")
    for number, part in enumerate(parts, 1 if split == "file" else first + 1):
        try:
            if part and not part.isspace():
                text = decode(part)
                for column in texts:
                    column.append(text if split == "file" else text.rstrip("\r"))
        except BadRecord as error:
            at = part.index(0) if b"\0" in part else _undecodable(part)
            faults.append((number + part.count(b"\n", 0, at), str(error)))


def decode(content: bytes) -> str:
    """Return UTF-8 bytes as a text; raises BadRecord if they are not, or contain a null byte."""
    if b"\0" in content:
        raise BadRecord("null byte; a corrupt or binary file?")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadRecord("not valid UTF-8.") from None


def _undecodable(content: bytes) -> int:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _parse_rows(
    columns: list[list[str | bytes | None]],
    texts: list[list[str]],
    faults: list[tuple[int, str]],
    keys: list[str],
    first: int,
) -> None:
    for number, row in enumerate(zip(*columns, strict=True), first + 1):
        try:
            values = []
            for key, value in zip(keys, row, strict=True):
                if value is None:
                    raise BadRecord(f'the column "{key}" is null.')
                values.append(check_text(value) if isinstance(value, str) else decode(value))
        except BadRecord as error:
            faults.append((number, str(error)))
            continue
        for column, text in zip(texts, values, strict=True):
            column.append(text)


def _records_before(segment: Segment) -> int:
    """Lines or rows of the file before the segment; counted only when a fault has to be named."""
    if not segment.start:
        return 0
    if segment.source.format == "parquet":
        metadata = open_parquet(segment.source).metadata
        return sum(metadata.row_group(group).num_rows for group in range(segment.start))
    count, left = 0, segment.start
    with open(segment.source.path, "rb") as stream:
        while left and (piece := stream.read(min(left, 1 << 20))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count
