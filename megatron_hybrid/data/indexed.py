"""Writer of Megatron's indexed data sets, byte for byte what upstream's builder writes.

The format is that of megatron/core/datasets/indexed_dataset.py: PREFIX.bin holds the token ids of
all documents, one after the other; PREFIX.idx holds, little-endian,

    magic "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' dtype,
    uint64 number of sequences S, uint64 length of the document index D = documents + 1,
    int32[S] tokens of each sequence, int64[S] its byte offset in PREFIX.bin,
    int64[D] first sequence of each document, and S.

Here a document is one sequence, as in upstream's preprocessing.
"""

import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_hybrid.data.files import sync_directory, temporary_path

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the dtype upstream picks for a vocabulary (DType.optimal_dtype)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx under temporary names, and names them at a clean exit.

    Used as a context manager; an exception inside leaves whatever was there before untouched.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"dtype {dtype} of token ids: Megatron reads uint16 or int32 here.")
        # Not with_suffix: a prefix may contain dots.
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.idx_path = prefix.with_name(prefix.name + ".idx")
        self.dtype = dtype
        self._lengths = array("i")
        self._stream: BinaryIO | None = None

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def __enter__(self) -> "IndexedWriter":
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = temporary_path(self.bin_path).open("wb")
        return self

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        ids: the token ids of all of them, one after the other, ``[sum(lengths)]``, of the writer's
        dtype; lengths: the tokens of each. Raises ValueError if the two disagree.
        """
        if self._stream is None:
            raise ValueError("add() on a writer that is not open; use it inside 'with'.")
        if ids.dtype != self.dtype or ids.size != lengths.sum():
            raise ValueError(
                f"{ids.size} ids of {ids.dtype} for documents of {lengths.sum()} tokens in all; "
                f"the writer takes exactly those, as {self.dtype}."
            )
        self._stream.write(ids.tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        bin_tmp, idx_tmp = temporary_path(self.bin_path), temporary_path(self.idx_path)
        try:
            with self._stream:
                if error is None:
                    _to_disk(self._stream)
            if error is not None:
                return
            with idx_tmp.open("wb") as stream:
                self._write_index(stream)
                _to_disk(stream)
            # Two names cannot change at once. Without its index a .bin is no data set, so a crash
            # in between never pairs the new .bin with an old .idx.
            self.idx_path.unlink(missing_ok=True)
            bin_tmp.replace(self.bin_path)
            idx_tmp.replace(self.idx_path)
            sync_directory(self.bin_path.parent)
        finally:
            self._stream = None
            bin_tmp.unlink(missing_ok=True)
            idx_tmp.unlink(missing_ok=True)

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = len(lengths)
        offsets = np.zeros(count, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        stream.write(MAGIC)
        stream.write(struct.pack("<QBQQ", 1, DTYPE_CODES[self.dtype], count, count + 1))
        for part in (lengths, offsets, np.arange(count + 1, dtype=np.int64)):
            stream.write(part.tobytes())


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
