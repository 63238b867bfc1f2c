"""From several data sets to one, byte for byte what upstream's IndexedDatasetBuilder.add_index makes of them.

Everything is read once, in blocks (twice to remove duplicates), so memory does not grow with the corpus. Shards of one
run of preprocessing are put in their order and have to be complete, so that their merge is the single run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hybrid.data import dedup, manifest
from megatron_hybrid.data.ids import range_of, union
from megatron_hybrid.data.indexed import IndexedWriter, bin_path, idx_path, read_index
from megatron_hybrid.data.merge_inputs import (
    Input,
    check_alike,
    check_output,
    find_prefixes,
    in_shard_order,
    open_input,
    read_blocks,
)
from megatron_hybrid.data.work import WorkFolder
from megatron_hybrid.files import checksum_text, to_disk


@dataclass(frozen=True)
class MergeJob:
    """The settings of a merge."""

    inputs: tuple[str, ...]
    prefix: Path
    dedup: bool = False
    overwrite: bool = False
    command: tuple[str, ...] = ()


class Merge:
    """One merge: look at the inputs, then do it (:meth:`run`)."""

    def __init__(self, job: MergeJob) -> None:
        """Find and check the inputs; raises ValueError for a user's mistake. Nothing is written."""
        self.job = job
        self.work = WorkFolder(job.prefix.with_name(f".{job.prefix.name}.merging"))
        prefixes = find_prefixes(job.inputs)
        check_output(job.prefix, prefixes)
        self.inputs, self.notes = in_shard_order([open_input(prefix) for prefix in prefixes])
        check_alike(self.inputs)
        if job.dedup:
            for one in self.inputs:
                if not one.one_each:
                    raise ValueError(
                        f"--dedup: {one.prefix} has documents of several sequences; only data sets with one sequence a "
                        "document can be de-duplicated."
                    )
        if not any(one.documents for one in self.inputs):
            raise ValueError("the inputs contain no documents; there is nothing to merge.")
        unknown = [one.prefix.name for one in self.inputs if one.manifest is None]
        if unknown:
            more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
            self.notes.append(f"without a manifest, so their tokenizer is not known: {', '.join(unknown[:3])}{more}")

    @property
    def bytes_to_read(self) -> int:
        """Bytes that progress is reported on."""
        return sum(one.bytes for one in self.inputs) * (2 if self.job.dedup else 1)

    def run(self, progress: Callable[[int], None] = lambda size: None) -> dict[str, Any]:
        """Write the merged data set; returns its manifest.

        progress gets the bytes that were read since the last call. Raises ValueError if the output exists or an input
        is not what its manifest says; OSError as it comes. If the merge is interrupted, no output appears; the next
        one starts over.
        """
        prefix = self.job.prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        left_over = self.work.exists
        state = self.work.open()
        # A merge that was killed while its files were renamed: these files are its own, and incomplete.
        half_done = state is not None and state.get("phase") == "publish"
        finals = (bin_path(prefix), idx_path(prefix), manifest.manifest_path(prefix))
        half_done = half_done and not all(path.exists() for path in finals)
        existing = [path for path in finals[:2] if path.exists()]
        if existing and not self.job.overwrite and not half_done:
            if left_over:
                self.work.close()
            else:
                self.work.delete()
            raise ValueError(f"{existing[0]} exists; give --overwrite to replace it, or another --output-prefix.")
        try:
            if not half_done:
                self.work.clear()
            names, described = self._write(progress)
            self.work.save({"phase": "publish"})
        except BaseException:
            self.work.close() if half_done else self.work.delete()
            raise
        self.work.publish(names)
        return described

    def _write(self, progress: Callable[[int], None]) -> tuple[dict[str, str], dict[str, Any]]:
        folder, prefix = self.work.path, self.job.prefix
        duplicates = _sum(one.manifest and one.manifest.get("duplicates") for one in self.inputs)
        with IndexedWriter(folder, "merged", self.inputs[0].dtype) as writer:
            if self.job.dedup:
                found = self._copy_unique(writer, progress)
                scanned, duplicates = None, (duplicates or 0) + found
            else:
                scanned = self._copy(writer, progress)
        described = manifest.describe(prefix, folder / "merged", scanned, **self._fields(duplicates))
        with (folder / "merged.json").open("wb") as stream:
            stream.write(manifest.to_json(described))
            to_disk(stream)
        finals = (bin_path(prefix), idx_path(prefix), manifest.manifest_path(prefix))
        return {f"merged{final.suffix}": final.name for final in finals}, described

    def _copy(self, writer: IndexedWriter, progress: Callable[[int], None]) -> manifest.Scanned:
        """Append all inputs; returns what is known of the .bin then."""
        whole, found = xxhash.xxh3_128(), None
        documents = None if all(one.one_each for one in self.inputs) else self.work.path / "merged.documents"
        if documents:
            documents.write_bytes(np.zeros(1, np.int64).tobytes())
        for one in self.inputs:
            if documents:
                _append_documents(documents, one, writer.documents)
            for ids, lengths in read_blocks(one):
                writer.add(ids, lengths)
                whole.update(ids.data)
                found = union((found, range_of(ids)))
                progress(ids.nbytes)
        writer.finish(np.memmap(documents, dtype=np.int64, mode="r") if documents else None)
        return manifest.Scanned(checksum_text(whole), found)

    def _copy_unique(self, writer: IndexedWriter, progress: Callable[[int], None]) -> int:
        """Append the first of equal documents; returns how many others there are."""
        path = self.work.path / "merged.digests"
        with path.open("wb") as stream:
            for one in self.inputs:
                for ids, lengths in read_blocks(one):
                    stream.write(dedup.digests(ids, lengths))
                    progress(ids.nbytes)
        count = sum(one.documents for one in self.inputs)
        keep = np.memmap(path.with_suffix(".keep"), dtype=bool, mode="w+", shape=(count,))
        duplicates = dedup.mark_first(path, keep)
        first = 0
        for one in self.inputs:
            for ids, lengths in read_blocks(one):
                stays = keep[first : first + len(lengths)]
                writer.add(ids[np.repeat(stays, lengths)], lengths[stays])
                first += len(lengths)
                progress(ids.nbytes)
        writer.finish()
        return duplicates

    def _fields(self, duplicates: int | None) -> dict[str, Any]:
        """What the manifest says beyond the files: the sums, or None where an input does not know."""
        known = [one.manifest for one in self.inputs if one.manifest is not None]
        complete = len(known) == len(self.inputs)
        tokenizer = known[0].get("tokenizer") if complete else None
        keys = {found.get("key") for found in known}
        return {
            "key": keys.pop() if complete and len(keys) == 1 else None,
            "tokenizer": tokenizer,
            "encoded": sum_encoded([found.get("encoded") for found in known], tokenizer) if complete else None,
            "duplicates": duplicates,
            "skipped": _sum(found.get("skipped") for found in known) if complete else None,
            "shard": "0/1",
            "inputs": [entry for found in known for entry in found.get("inputs") or []],
            "merged": [
                {
                    "name": str(one.prefix),
                    "documents": one.documents,
                    "tokens": one.tokens,
                    "manifest": one.manifest is not None,
                }
                for one in self.inputs
            ],
            "command": list(self.job.command),
        }


def _append_documents(path: Path, one: Input, sequences: int, most: int = 1 << 20) -> None:
    """Append an input's document index, without its first entry, after ``sequences`` sequences."""
    documents = read_index(one.prefix).documents
    with path.open("ab") as stream:
        for at in range(1, len(documents), most):
            stream.write((documents[at : at + most] + sequences).tobytes())


# --- sums ------------------------------------------------------------------------------------------


def _sum(values: Any) -> int | None:
    """The sum of those that are known, None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def sum_encoded(entries: list[dict[str, Any] | None], tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Add up what preprocessing counted (the manifest's ``encoded``); None if one of them did not."""
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries) or tokenizer is None:
        return None
    total: dict[str, Any] = {
        name: sum(entry[name] for entry in known) for name in ("documents", "tokens", "text_bytes", "empty")
    }
    filtered: dict[str, int] = {}
    for entry in known:
        for rule, count in entry["filtered"].items():
            filtered[rule] = filtered.get(rule, 0) + count
    marks = total["documents"] * (bool(tokenizer["prepend_bos"]) + bool(tokenizer["append_eod"]))
    tokens = total["tokens"] - marks
    return {**total, "filtered": filtered, "bytes_per_token": total["text_bytes"] / tokens if tokens > 0 else None}
