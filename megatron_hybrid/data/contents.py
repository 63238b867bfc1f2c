"""What a run has to know of a data set before it reads it: that it is complete, its content, its largest id."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_hybrid.data import manifest
from megatron_hybrid.data.fingerprint import fingerprint
from megatron_hybrid.data.ids import Range
from megatron_hybrid.data.indexed import Index, bin_path, idx_path, read_index
from megatron_hybrid.data.verify import index_fault


class Contents(NamedTuple):
    """Of one data set."""

    prefix: str
    content: str
    """Its fingerprint (:mod:`megatron_hybrid.data.fingerprint`)."""
    dtype: np.dtype
    known: Range | None
    """Its ids, by the manifest; None where that does not say, or is older than the ids."""
    limit: int | None
    """An exclusive upper bound of the ids, if one is known."""


def examine(prefix: str) -> Contents:
    """Look at a data set's index and manifest and at the size of its ids' file; the ids are not read.

    Raises:
        ValueError: Files are missing, corrupt, of different data sets, or without tokens.
    """
    path = Path(prefix)
    files = (idx_path(path), bin_path(path))
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise ValueError(
            f"there is no {missing}: give the prefix of a .bin/.idx pair, without the extension; "
            "tools/preprocess_data.py makes one from text."
        )
    index = read_index(path)
    _check_index(path, index)
    found, said = fingerprint(path), manifest.read_manifest(path)
    if said is not None:
        _check_manifest(path, said, found.order)
    if said is None or files[1].stat().st_mtime_ns > manifest.manifest_path(path).stat().st_mtime_ns:
        limit = int(np.iinfo(index.dtype).max) + 1 if index.dtype.kind == "u" else None
        return Contents(prefix, found.content, index.dtype, None, limit)
    vocabulary = (said.get("tokenizer") or {}).get("vocab_size")  # which preprocessing has compared each id with
    return Contents(prefix, found.content, index.dtype, manifest.known_ids(said), vocabulary)


def _check_index(path: Path, index: Index) -> None:
    remedy = f"Rebuild it (tools/inspect_dataset.py {path} --verify lists all that is wrong)."
    if fault := index_fault(index):
        raise ValueError(f"{idx_path(path)} is corrupt: {fault}. {remedy}")
    size, needed = bin_path(path).stat().st_size, index.tokens * index.dtype.itemsize
    if size != needed:
        raise ValueError(
            f"{bin_path(path)} has {size:,} bytes, but by its index {index.tokens:,} tokens of {index.dtype} take "
            f"{needed:,}: it is truncated, or the two files are of different data sets. {remedy}"
        )
    if not index.tokens:
        raise ValueError(
            f"{path} has no tokens ({len(index.lengths):,} documents), on which Megatron would hang: drop this data "
            "set, or preprocess its text again."
        )


def _check_manifest(path: Path, said: dict[str, Any], index_checksum: str) -> None:
    """A manifest that was left next to other files would describe the wrong data."""
    size, (noted_size, noted_index) = bin_path(path).stat().st_size, manifest.noted_files(said)
    if noted_size == size and noted_index == index_checksum:
        return
    raise ValueError(
        f"{manifest.manifest_path(path)} is not the manifest of the files next to it: it says {noted_size} bytes for "
        f".bin, which has {size}, and {noted_index} for .idx, which has {index_checksum}. Rebuild the data set, or "
        "delete the .json to go without a manifest."
    )
