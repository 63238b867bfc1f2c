"""Megatron's indexed data sets, byte for byte what upstream's builder writes.

The format is that of megatron/core/datasets/indexed_dataset.py: PREFIX.bin contains the token ids of
all documents, one after the other; PREFIX.idx contains, little-endian,

    magic "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' dtype,
    uint64 number of sequences S, uint64 length of the document index D = documents + 1,
    int32[S] tokens of each sequence, int64[S] its byte offset in PREFIX.bin,
    int64[D] first sequence of each document, and S.

Here a document is one sequence, as in upstream's preprocessing of text for GPT; data sets of other tools may have
several sequences in a document.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_hybrid.files import open_at, to_disk

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES: dict[np.dtype, int] = {
    np.dtype(kind): code
    for kind, code in ((np.uint8, 1), (np.int8, 2), (np.int16, 3), (np.int32, 4), (np.int64, 5), (np.uint16, 8))
}
"""Integer types of upstream's DType, which are those of token ids; its own tools write int32 and uint16."""
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20
"""Entries of an index that are worked on at a time."""


def bin_path(prefix: Path) -> Path:
    """Return PREFIX.bin; not with_suffix, since a prefix may contain dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return PREFIX.idx."""
    return prefix.with_name(prefix.name + ".idx")


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the dtype upstream picks for a vocabulary (DType.optimal_dtype)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class Index(NamedTuple):
    """The content of a PREFIX.idx; the arrays are memory maps of the file."""

    dtype: np.dtype
    lengths: np.ndarray
    """Tokens of each sequence, int32 ``[sequences]``."""
    offsets: np.ndarray
    """Where each sequence begins in PREFIX.bin, in bytes, int64 ``[sequences]``."""
    documents: np.ndarray
    """First sequence of each document, and the number of sequences, int64 ``[documents + 1]``."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def read_index(prefix: Path) -> Index:
    """Map PREFIX.idx; raises ValueError if it is missing, truncated or of another format."""
    path = idx_path(prefix)
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the prefix of a .bin/.idx pair, without the extension.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not an index of Megatron's data sets (its header is wrong).")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    dtype = {known: dtype for dtype, known in DTYPE_CODES.items()}.get(code)
    if version != 1 or dtype is None:
        raise ValueError(
            f"{path}: version {version}, dtype code {code}; known are version 1 and the codes of integers, "
            f"{', '.join(f'{code} ({dtype})' for dtype, code in DTYPE_CODES.items())}."
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise ValueError(f"{path} is truncated: {size:,} bytes, but {sequences:,} sequences need {expected:,}.")
    if size > expected:
        raise ValueError(f"{path} has {size - expected:,} bytes too many; multimodal data sets are not supported.")
    content = np.memmap(path, mode="r")

    def part(dtype: Any, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(content, dtype=dtype, count=count, offset=offset)

    at = _HEADER.size
    return Index(
        dtype,
        part(np.int32, sequences, at),
        part(np.int64, sequences, at + 4 * sequences),
        part(np.int64, documents, at + 12 * sequences),
    )


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray | None = None) -> None:
    """Write a PREFIX.idx in blocks, so that ``lengths`` may be a map of a large file.

    lengths: tokens of each sequence, int32 ``[sequences]``; documents: first sequence of each document, and the
    number of sequences, int64; one sequence a document if None.
    """
    count = len(lengths)
    entries = count + 1 if documents is None else len(documents)
    stream.write(_HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], count, entries))
    for block in _blocks(count):
        stream.write(lengths[block].astype(np.int32, copy=False).tobytes())
    offset = 0
    for block in _blocks(count):
        ends = np.cumsum(lengths[block], dtype=np.int64) * dtype.itemsize + offset
        stream.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
        offset = int(ends[-1])
    for block in _blocks(entries):
        part = np.arange(block.start, block.stop) if documents is None else documents[block]
        stream.write(part.astype(np.int64, copy=False).tobytes())


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


class Sizes(NamedTuple):
    """Progress of a writer's files."""

    documents: int
    tokens: int


NOTHING = Sizes(0, 0)


class IndexedWriter:
    """Appends documents to FOLDER/NAME.bin and makes NAME.idx of them at the end.

    The files are meant for a folder that is not yet the data set's place. ``sync`` flushes them to disk; a later
    writer at the sizes that it returned continues as if there had been no other. The length of each document waits in
    NAME.lengths, so that memory does not grow with the corpus.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, at: Sizes = NOTHING) -> None:
        """Open the files, truncated to ``at``. Raises ValueError if they are shorter, or Megatron has no such dtype."""
        if dtype not in DTYPE_CODES:
            raise ValueError(f"dtype {dtype} of token ids: Megatron reads {', '.join(map(str, DTYPE_CODES))}.")
        self.prefix, self.dtype = folder / name, dtype
        self.documents, self.tokens = at
        self._bin = open_at(bin_path(self.prefix), at.tokens * dtype.itemsize)
        self._lengths = open_at(self.prefix.with_name(name + ".lengths"), at.documents * 4)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        ids: the token ids of all of them, one after the other, ``[sum(lengths)]``, of the writer's
        dtype; lengths: the tokens of each. Raises ValueError if the two disagree.
        """
        if ids.dtype != self.dtype or ids.size != lengths.sum():
            raise ValueError(
                f"{ids.size} ids of {ids.dtype} for documents of {lengths.sum()} tokens in all; "
                f"the writer takes exactly those, as {self.dtype}."
            )
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(f"a document of {lengths.max():,} tokens: the format counts up to 2,147,483,647.")
        self._bin.write(np.ascontiguousarray(ids).data)
        self._lengths.write(lengths.astype(np.int32).tobytes())
        self.documents += len(lengths)
        self.tokens += ids.size

    def sync(self) -> Sizes:
        """Flush all that was added to disk; returns the sizes to resume from."""
        for stream in (self._bin, self._lengths):
            to_disk(stream)
        return Sizes(self.documents, self.tokens)

    def finish(self, documents: np.ndarray | None = None) -> None:
        """Write the index and close; ``documents`` as for :func:`write_index`."""
        if not self._bin.closed:
            self.sync()
            self.close()
        lengths_path = self.prefix.with_name(self.prefix.name + ".lengths")
        lengths = np.memmap(lengths_path, dtype=np.int32, mode="r") if self.documents else np.empty(0, np.int32)
        with idx_path(self.prefix).open("wb") as stream:
            write_index(stream, self.dtype, lengths, documents)
            to_disk(stream)

    def close(self) -> None:
        """Close the files as they are."""
        for stream in (self._bin, self._lengths):
            stream.close()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def token_blocks(lengths: np.ndarray, most: int = 1 << 22) -> Iterator[tuple[slice, slice]]:
    """Yield consecutive documents, and their tokens, in blocks of at most ``most`` tokens or of one document."""
    first = token = 0
    while first < len(lengths):
        ends = np.cumsum(lengths[first : first + most // 64], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, most, side="right")))
        yield slice(first, first + count), slice(token, token + int(ends[count - 1]))
        first, token = first + count, token + int(ends[count - 1])
