"""Checks that a data set is complete and matches its manifest. Everything is read once, in blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megatron_hybrid.data import manifest
from megatron_hybrid.data.ids import Range, range_of, union
from megatron_hybrid.data.indexed import Index, bin_path, idx_path, read_index, token_blocks
from megatron_hybrid.files import checksum, checksum_text

_BLOCK = 1 << 20


class Check(NamedTuple):
    """One check."""

    name: str
    fault: str
    """What is wrong; empty if nothing is."""
    note: str = ""
    """What was found where nothing is wrong."""


def index_fault(index: Index) -> str:
    """Return what is wrong inside an index, as a phrase; empty if nothing is."""
    return lengths_fault(index) or documents_fault(index)


def lengths_fault(index: Index) -> str:
    """Return the first sequence that has a negative length or does not begin where the one before it ends."""
    at = 0
    for start in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[start : start + _BLOCK]
        if lengths.min() < 0:
            return f"sequence {start + int(np.argmin(lengths)):,} has a length of {int(lengths.min()):,}"
        ends = at + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        begins = np.concatenate(([at], ends[:-1]))
        offsets = index.offsets[start : start + _BLOCK]
        if wrong := int((offsets != begins).sum()):
            which = int(np.argmax(offsets != begins))
            return (
                f"sequence {start + which:,} is said to begin at byte {int(offsets[which]):,}, but those before it end "
                f"at {int(begins[which]):,} ({wrong:,} such)"
            )
        at = int(ends[-1])
    return ""


def documents_fault(index: Index) -> str:
    """Return where the document index does not go from 0 to the number of sequences without a step back."""
    documents, sequences = index.documents, len(index.lengths)
    if not len(documents):
        return "its list of documents is empty"
    if documents[0] != 0:
        return f"the first document begins at sequence {int(documents[0]):,}, not 0"
    for start in range(0, len(documents) - 1, _BLOCK):
        steps = np.diff(documents[start : start + _BLOCK + 1])
        if steps.min() < 0:
            which = start + int(np.argmax(steps < 0))
            return f"document {which + 1:,} begins at sequence {int(documents[which + 1]):,}, before the one before it"
    if documents[-1] != sequences:
        return f"the last document ends at sequence {int(documents[-1]):,} of {sequences:,}"
    return ""


def document_lengths(index: Index, most: int = 1 << 16) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, int64, in blocks; the index has to be valid."""
    for start in range(0, len(index.documents) - 1, most):
        bounds = index.documents[start : start + most + 1]
        lengths = index.lengths[bounds[0] : bounds[-1]]
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[bounds - bounds[0]]
        yield np.diff(ends)


def verify(prefix: Path, progress: Callable[[int], None] = lambda size: None) -> Iterator[Check]:
    """Check a data set; checks that depend on a failed one are skipped.

    progress gets the bytes of PREFIX.bin that were read since the last call. Raises ValueError if there is no such
    data set at all.
    """
    if not bin_path(prefix).exists() and not idx_path(prefix).exists():
        raise ValueError(f"there is no {bin_path(prefix)} and no {idx_path(prefix)}; give the prefix of a data set.")
    index, fault = _try(read_index, prefix)
    yield Check("index: header and size", fault, str(index.dtype) if index else "")
    said, fault_said = _try(manifest.read_manifest, prefix)
    whole = False
    if index is not None:
        lengths, documents = lengths_fault(index), documents_fault(index)
        yield Check("index: offsets are the sums of lengths", lengths, f"{len(index.lengths):,} sequences")
        yield Check("index: documents", documents, f"{len(index.documents) - 1:,} documents")
        size = _size_fault(prefix, index)
        yield Check("data: size", size, f"{index.tokens:,} tokens")
        whole = not (lengths or documents or size)
    if fault_said:
        yield Check("manifest", fault_said)
    if said is None and not fault_said:
        yield Check("manifest", "", "none, so nothing to compare with")
    yield from _scan_checks(prefix, index if whole else None, said, progress)
    if said is not None:
        if index is not None:
            fault = _figures_fault(prefix, index, said)
            yield Check("manifest: documents, tokens, sizes, lengths", fault)
        if idx_path(prefix).is_file():
            yield Check("manifest: checksum of .idx", _checksum_fault(said, "idx", checksum(idx_path(prefix))))


def _try(read: Callable[[Path], Any], prefix: Path) -> tuple[Any, str]:
    try:
        return read(prefix), ""
    except ValueError as error:
        return None, str(error)


def _size_fault(prefix: Path, index: Index) -> str:
    path = bin_path(prefix)
    wanted = index.tokens * index.dtype.itemsize
    if not path.is_file():
        return f"there is no {path}"
    if path.stat().st_size != wanted:
        return f"{path} has {path.stat().st_size:,} bytes, but {index.tokens:,} tokens need {wanted:,}"
    return ""


def _figures_fault(prefix: Path, index: Index, said: dict[str, Any]) -> str:
    encoded, duplicates = said.get("encoded"), said.get("duplicates") or 0
    count = len(index.documents) - 1
    found = {
        "documents": (said.get("documents"), count),
        "tokens": (said.get("tokens"), index.tokens),
        "dtype": (said.get("dtype"), str(index.dtype)),
        "size of .idx": (_file(said, "idx").get("size"), idx_path(prefix).stat().st_size),
    }
    if bin_path(prefix).is_file():
        found["size of .bin"] = (_file(said, "bin").get("size"), bin_path(prefix).stat().st_size)
    if not lengths_fault(index):
        found["lengths"] = (said.get("lengths"), manifest.length_statistics(index.lengths))
    if encoded is not None:
        found["documents that were encoded"] = (encoded.get("documents"), count + duplicates)
    wrong = [f"{name} {said_} but it is {is_}" for name, (said_, is_) in found.items() if said_ != is_]
    return f"it says {'; '.join(wrong)}" if wrong else ""


def _file(said: dict[str, Any], which: str) -> dict[str, Any]:
    entry = said.get(which)
    return entry if isinstance(entry, dict) else {}


def _checksum_fault(said: dict[str, Any], which: str, found: str) -> str:
    wanted = _file(said, which).get("checksum")
    return "" if found == wanted else f"it says {wanted}, but the file has {found}"


# --- the ids ---------------------------------------------------------------------------------------


class _Scan:
    """What one pass over all ids finds."""

    def __init__(self, bos: int | None, eod: int | None) -> None:
        self.bos, self.eod = bos, eod
        self.ids: Range | None = None
        self.hash = xxhash.xxh3_128()
        self.done = 0
        self.without_bos: list[int] = []
        self.without_eod: list[int] = []
        self.counts = {"bos": 0, "eod": 0}

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Look at the next documents."""
        self.hash.update(ids.data)
        self.ids = union((self.ids, range_of(ids)))
        ends = np.cumsum(lengths)
        filled = lengths > 0
        for name, wanted, at, wrong in (
            ("bos", self.bos, ends - lengths, self.without_bos),
            ("eod", self.eod, ends - 1, self.without_eod),
        ):
            if wanted is not None:
                marked = filled.copy()
                marked[filled] = ids[at[filled]] == wanted
                missing = np.flatnonzero(~marked)
                self.counts[name] += len(missing)
                wrong.extend((missing[: max(0, 3 - len(wrong))] + self.done).tolist())
        self.done += len(lengths)


def _scan_checks(
    prefix: Path, index: Index | None, said: dict[str, Any] | None, progress: Callable[[int], None]
) -> Iterator[Check]:
    """Check PREFIX.bin; the ids only if the index is valid."""
    path = bin_path(prefix)
    if not path.is_file():
        return
    if index is None:
        if said is not None:
            yield Check("manifest: checksum of .bin", _checksum_fault(said, "bin", checksum(path)))
        return
    entry = (said or {}).get("tokenizer") or {}
    bos = entry.get("bos_id") if entry.get("prepend_bos") else None
    eod = entry.get("eod_id") if entry.get("append_eod") else None
    scan = _Scan(bos, eod)
    with path.open("rb") as stream:
        for block in document_lengths(index):
            for documents, tokens in token_blocks(block):
                ids = np.fromfile(stream, dtype=index.dtype, count=tokens.stop - tokens.start)
                scan.add(ids, block[documents])
                progress(ids.nbytes)
    size, found = entry.get("vocab_size"), scan.ids or Range(0, -1)
    if size is not None:
        fault = found.fault(size) if scan.ids else ""
        yield Check("data: ids are in the vocabulary", fault, f"largest {found.greatest:,} of {size:,}")
    else:
        text = f"ids from {found.least:,} to {found.greatest:,}" if found.least < 0 else ""
        yield Check("data: ids are not negative", text, f"largest {found.greatest:,}")
    if (noted := manifest.known_ids(said)) is not None:
        fault = "" if noted == found else f"it says {noted.least:,} to {noted.greatest:,}, but they are "
        yield Check("manifest: ids", fault and f"{fault}{found.least:,} to {found.greatest:,}")
    yield from _mark_checks(scan, index.tokens)
    if said is not None:
        yield Check("manifest: checksum of .bin", _checksum_fault(said, "bin", checksum_text(scan.hash)))


def _mark_checks(scan: _Scan, tokens: int) -> Iterator[Check]:
    note = f"{scan.done:,} documents, {tokens:,} tokens"
    for title, token, count, first in (
        ("BOS {} starts each document", scan.bos, scan.counts["bos"], scan.without_bos),
        ("EOD {} ends each document", scan.eod, scan.counts["eod"], scan.without_eod),
    ):
        if token is not None:
            numbers = ", ".join(f"{number:,}" for number in first)
            fault = f"{count:,} of {scan.done:,} documents are without: {numbers}{', ...' if count > 3 else ''}"
            yield Check(f"data: {title.format(token)}", fault if count else "", note)


# --- the inputs ------------------------------------------------------------------------------------


def verify_inputs(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each input that a manifest names and how it is now: ok, changed, gone, or unknown where nothing was noted.

    Paths are taken as the manifest has them, so relative ones from the folder in which it was made.
    """
    for entry in said.get("inputs") or []:
        path, start, end = Path(entry["path"]), entry.get("start", 0), entry.get("end")
        name = str(path) if end is None else f"{path} [{start}:{end}]"
        if str(path) == "-" or not entry.get("checksum"):
            yield name, "unknown"
        elif not path.is_file():
            yield name, "gone"
        elif path.stat().st_size != entry["size"]:
            yield name, "changed"
        else:
            whole = end is None or _is_parquet(path)  # start and end count row groups there
            found = checksum(path) if whole else checksum(path, start, end)
            yield name, "ok" if found == entry["checksum"] else "changed"


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"
