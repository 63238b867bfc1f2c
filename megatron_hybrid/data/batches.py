"""The content of a corpus as a stream of batches, and how it is divided into shards.

JSON lines and plain text may be compressed (gzip, zstd). A batch is about a megabyte, or one document where that is
longer. Nothing is parsed here.
"""

import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import xxhash

from megatron_hybrid.data.parquet import read_rows, row_group_at
from megatron_hybrid.data.sources import BATCH_BYTES, STANDARD_INPUT, Batch, Position, Segment, Source
from megatron_hybrid.files import checksum_text

BEGINNING = Position(0, 0, 0)
_COMPRESSED_BYTES = 1 << 12
"""Bytes that are decompressed at a time: few, because zstd can expand them 30,000 times."""


def shard(sources: list[Source], index: int, count: int, text_split: str = "file") -> list[Segment]:
    """Return the contiguous part of the corpus that shard ``index`` of ``count`` reads.

    Shards have about equal bytes. Files of plain lines are divided between lines, Parquet files between row groups; a
    compressed file, or a text file that is not split by lines, belongs to the shard in which it begins. All shards,
    one after the other, are the corpus. Raises ValueError for a shard of standard input.
    """
    if count > 1 and any(source.path == STANDARD_INPUT for source in sources):
        raise ValueError("--shard divides files, and standard input cannot be divided. Write it to a file first.")
    if count == 1:
        return [Segment(source) for source in sources]
    total = sum(source.size for source in sources)
    low, high = total * index // count, total * (index + 1) // count
    segments, begin = [], 0
    for source in sources:
        first, last = low - begin, high - begin  # the shard's range in this file
        begin += source.size
        if last <= 0 or first >= source.size:
            continue
        if source.compression or source.format == "text" and text_split == "file":
            if first <= 0:
                segments.append(Segment(source))
            continue
        cut = row_group_at if source.format == "parquet" else _line_at
        start, end = cut(source, first), cut(source, last)
        if start < end:
            segments.append(Segment(source, start, end))
    return segments


def _line_at(source: Source, offset: int) -> int:
    """The first start of a line at or after ``offset``."""
    if offset <= 0:
        return 0
    if offset >= source.size:
        return source.size
    with open(source.path, "rb") as stream:
        stream.seek(offset - 1)
        while piece := stream.read(BATCH_BYTES):
            found = piece.find(b"\n")
            if found >= 0:
                return stream.tell() - len(piece) + found + 1
    return source.size


class Unreadable(Exception):
    """The rest of a file cannot be read: a corrupt or truncated compressed file."""


def read_batches(
    segments: list[Segment], keys: list[str], text_split: str = "file", at: Position = BEGINNING
) -> Iterator[Batch]:
    """Yield the corpus from ``at`` on in batches of about a megabyte, in order.

    keys: the columns to read of Parquet files. Raises ValueError if a file changed its size meanwhile, or is not a
    Parquet file; OSError if it cannot be read.
    """
    for number, segment in enumerate(segments[at.segment :], at.segment):
        start = at if number == at.segment else Position(number, 0, 0)
        if segment.source.format == "parquet":
            yield from read_rows(segment, start, keys)
        else:
            yield from _read_stream(segment, start, text_split)


class _Raw:
    """The bytes of a segment as they are on disk, counted and hashed."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.hash, self.count = segment, xxhash.xxh3_128(), 0

    def __iter__(self) -> Iterator[bytes]:
        source, start, end = self.segment.source, self.segment.start, self.segment.end
        if source.path == STANDARD_INPUT and sys.stdin is None:
            raise ValueError("input -: standard input is closed.")
        stream: BinaryIO = sys.stdin.buffer if source.path == STANDARD_INPUT else open(source.path, "rb")  # noqa: SIM115
        with stream:
            if start:
                stream.seek(start)
            left = end - start if end is not None else None
            while left != 0:
                piece = stream.read(BATCH_BYTES if left is None else min(left, BATCH_BYTES))
                if not piece:
                    break
                left = left - len(piece) if left is not None else None
                self.count += len(piece)
                self.hash.update(piece)
                yield piece
            changed = source.mtime_ns and os.fstat(stream.fileno()).st_mtime_ns != source.mtime_ns
        wanted = (source.size if end is None else end) - start
        if source.path != STANDARD_INPUT and (changed or self.count != wanted):
            raise ValueError(
                f"{source.path} changed while it was read ({self.count:,} bytes of {wanted:,}); start over with "
                "--overwrite when nobody writes to it."
            )

    @property
    def checksum(self) -> str:
        return checksum_text(self.hash)


def _read_stream(segment: Segment, at: Position, text_split: str) -> Iterator[Batch]:
    raw = _Raw(segment)
    split = text_split if segment.source.format == "text" else "line"
    pieces = _decompressed(raw, segment.source.compression)
    offset, record, counted = at.offset, at.record, 0
    try:
        blocks = _blocks(_skip(pieces, at.offset), split)
        for block in blocks:
            first, record, offset = record, record + _records(block, split), offset + len(block)
            size, counted = raw.count - counted, raw.count
            yield Batch(segment, first, block, Position(at.segment, offset, record), size, len(block))
    except Unreadable as error:
        yield Batch(segment, record, b"", Position(at.segment + 1, 0, 0), raw.count - counted, error=str(error))
        return
    yield Batch(segment, record, b"", Position(at.segment + 1, 0, 0), raw.count - counted, checksum=raw.checksum)


def _records(block: bytes, split: str) -> int:
    return 1 if split == "file" else block.count(b"\n")


def _decompressed(raw: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Yield all that can be decompressed, then raise Unreadable if the file is corrupt or ends too early."""
    if not compression:
        yield from raw
        return
    new = _decompressor(compression)
    state = None
    try:
        for piece in _small(raw):
            while piece:
                if state is None or state.eof:
                    if state is not None and not (piece := piece.lstrip(b"\0")):
                        break  # padding; else another member or frame follows
                    state = new()
                if content := state.decompress(piece):
                    yield content
                piece = state.unused_data if state.eof else b""
    except _errors(compression) as error:
        raise Unreadable(f"corrupt {compression} data ({error})") from None
    if state is None or not state.eof:
        raise Unreadable(f"truncated {compression} file: it ends {'in the middle' if state else 'before it begins'}")


def _small(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), _COMPRESSED_BYTES):
            yield piece[start : start + _COMPRESSED_BYTES]


def _decompressor(compression: str) -> Callable[[], Any]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj


def _errors(compression: str) -> type[Exception]:
    if compression == "gzip":
        return zlib.error
    import zstandard

    return zstandard.ZstdError


def _skip(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    for piece in pieces:
        if count >= len(piece):
            count -= len(piece)
        else:
            yield piece[count:]
            count = 0


def _blocks(pieces: Iterator[bytes], split: str) -> Iterator[bytes]:
    """Yield blocks of complete lines, or the whole file; at a fault, only the complete lines before it."""
    if split == "file":
        yield b"".join(pieces)
        return
    held: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= BATCH_BYTES and b"\n" in piece:
                content = b"".join(held)
                cut = content.rfind(b"\n") + 1
                yield from _divided(content[:cut])
                held, size = [content[cut:]], len(content) - cut
    except Unreadable:
        if whole := b"".join(held).rpartition(b"\n")[0]:
            yield whole + b"\n"
        raise
    if size:
        yield from _divided(b"".join(held))


def _divided(content: bytes) -> Iterator[bytes]:
    """Yield complete lines in parts of about a batch: one piece of a compressed file can be many."""
    if len(content) < 2 * BATCH_BYTES:
        yield content
        return
    start = 0
    while start < len(content):
        end = content.rfind(b"\n", start, start + BATCH_BYTES) + 1
        if not end:
            end = content.find(b"\n", start) + 1 or len(content)
        yield content[start:end]
        start = end
