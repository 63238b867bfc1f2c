"""Exact de-duplication of documents, in memory that does not grow with the corpus.

Two documents are the same if their token ids are: each is known by the 128-bit xxh3 of its ids, which two different
documents out of a billion share with a probability of about 1e-21. The first one stays.
"""

from pathlib import Path

import numpy as np
import xxhash

from megatron_hybrid.data.indexed import IndexedWriter, bin_path, token_blocks

DIGEST_BYTES = 16
_MOST_AT_ONCE = 1 << 24
"""Digests that are compared in memory at a time; about 1 GB with their order."""


def digests(ids: np.ndarray, lengths: np.ndarray) -> bytes:
    """Return the digests of documents, 16 bytes each; ids and lengths as for IndexedWriter.add."""
    content = memoryview(np.ascontiguousarray(ids)).cast("B")
    size, at, found = ids.dtype.itemsize, 0, []
    for length in (lengths * size).tolist():
        found.append(xxhash.xxh3_128_digest(content[at : at + length]))
        at += length
    return b"".join(found)


def mark_first(path: Path, keep: np.ndarray, most: int = _MOST_AT_ONCE) -> int:
    """Set ``keep`` to whether each document is the first of its kind; returns how many are not.

    path: a file of digests; keep: bool ``[documents]``, such as a map of a file. The digests are gone through once for
    each ``most`` documents.
    """
    keep[:] = True
    if not len(keep):
        return 0
    words = np.memmap(path, dtype=np.uint64, mode="r", shape=(len(keep), 2))
    starts = range(0, len(words), most)
    for start in starts:  # within blocks first: a text that is there a million times would else fill the memory
        block = np.asarray(words[start : start + most])
        keep[start + _repeated(block)] = False
    parts = len(starts)
    for part in range(parts):
        where = np.concatenate([_chosen(words, keep, part, parts, start, most) for start in starts])
        keep[where[_repeated(words[where])]] = False
    return len(keep) - int(np.count_nonzero(keep))


def _chosen(words: np.ndarray, keep: np.ndarray, part: int, parts: int, start: int, most: int) -> np.ndarray:
    """Documents of one block that are still kept and belong to one part of the digests."""
    block = slice(start, start + most)
    return np.flatnonzero(keep[block] & (words[block, 0] % np.uint64(parts) == part)) + start


def _repeated(words: np.ndarray) -> np.ndarray:
    """Which digests, uint64 ``[n, 2]``, are those of an earlier one."""
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ones stay in the corpus's order
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    return order[1:][same]


def copy_kept(prefix: Path, lengths: np.ndarray, keep: np.ndarray, writer: IndexedWriter) -> None:
    """Append the documents of PREFIX.bin that ``keep`` names to ``writer``."""
    if not len(lengths) or not lengths.any():
        return
    ids = np.memmap(bin_path(prefix), dtype=writer.dtype, mode="r")
    for documents, tokens in token_blocks(lengths):
        stays = keep[documents]
        writer.add(ids[tokens][np.repeat(stays, lengths[documents])], lengths[documents][stays])
