"""From a corpus to data sets on disk: in order, in bounded memory, and safe to interrupt at any moment."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data import dedup, manifest
from megatron_hybrid.data.batches import read_batches, shard
from megatron_hybrid.data.documents import parse
from megatron_hybrid.data.encode import Encoded, Encoder, Encoding, in_order, make_encoders
from megatron_hybrid.data.indexed import IndexedWriter, bin_path, idx_path, read_index
from megatron_hybrid.data.output import Done, Output, Totals
from megatron_hybrid.data.sources import STANDARD_INPUT, Segment, Source, find_sources
from megatron_hybrid.data.work import WorkFolder
from megatron_hybrid.files import to_disk

STATE_FORMAT = 1
SAMPLE_BYTES = 250_000
"""Text at the start of the corpus on which gigatoken is checked."""


@dataclass(frozen=True)
class Job:
    """The settings of a run of preprocessing."""

    inputs: tuple[str, ...]
    prefix: Path
    """The data sets are PREFIX_KEY_document."""
    encoding: Encoding
    input_format: str = "auto"
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    """Index and number of shards."""
    dedup: bool = False
    resume: bool = False
    overwrite: bool = False
    save_every: float = 10.0
    """Seconds between two states on disk."""
    command: tuple[str, ...] = ()


class Preprocessing:
    """One run: plan it (:meth:`start`), then do it (:meth:`run`)."""

    def __init__(self, job: Job) -> None:
        """Find the inputs and name the outputs; raises ValueError for a user's mistake. Nothing is written."""
        _check(job)
        self.job = job
        self.sources, self.passed_over = find_sources(job.inputs, job.input_format)
        index, count = job.shard
        self.segments = shard(self.sources, index, count, job.encoding.text_split)
        suffix = f".shard-{index:05}-of-{count:05}" if count > 1 else ""
        self.prefixes = [job.prefix.with_name(f"{job.prefix.name}_{key}_document{suffix}") for key in job.encoding.keys]
        name = f"{job.prefix.name}_{'_'.join(job.encoding.keys)}_document{suffix}"
        self.work = WorkFolder(job.prefix.with_name(f".{name}.unfinished"))
        self.report = job.prefix.with_name(f"{name}.skipped.jsonl")
        self.encoding = replace(job.encoding, digests=job.dedup)
        self.state: dict[str, Any] = {}
        self.first_fault = ""

    # --- before the work -------------------------------------------------------------------------------

    def start(self) -> str:
        """Resume an earlier run or start a new one; returns a line that says which.

        Raises ValueError if outputs exist, an earlier run was different, or the tokenizer cannot do what is asked.
        """
        self.complete = False
        self._require_permission()
        self.encoders, self.engine = make_encoders(self.encoding, self.job.workers, self._sample())
        self.config = self._config(self.encoders[0])
        self.work.path.parent.mkdir(parents=True, exist_ok=True)
        state = self.work.open()
        try:
            self._require_permission()
            if self.job.resume and state is not None:
                self._require_same(state["config"])
                self.state = state
                return f"resumed after {self.documents:,} documents"
            if self.job.resume and self._finished():
                self._require_same(manifest.read_manifest(self.prefixes[-1]).get("config"))  # type: ignore[union-attr]
                self.complete = True
                self.work.delete()
                return "complete already; nothing to do"
            self.work.clear()
        except BaseException:
            self.work.close() if state is not None else self.work.delete()
            raise
        return "nothing to resume: starting from the beginning" if self.job.resume else ""

    def _require_permission(self) -> None:
        """Refuses to overwrite existing files, unless a flag permits it."""
        paths = [path for prefix in self.prefixes for path in _files_of(prefix)]
        folders = [path for path in paths if path.is_dir()]
        if folders:
            raise ValueError(f"{folders[0]} is a folder, and would be a file of the output; give another prefix.")
        existing = [path for path in paths if path.exists()]
        if self.job.overwrite or self.job.resume:
            return
        if existing:
            raise ValueError(f"{existing[0]} exists; give --overwrite to replace it, or another --output-prefix.")
        if self.work.exists:
            raise ValueError(
                f"an unfinished run left {self.work.path}; give --resume to continue, --overwrite to start over, or "
                "another --output-prefix."
            )

    def _finished(self) -> bool:
        """Whether all files are there and as long as their manifests say."""
        for prefix in self.prefixes:
            found = manifest.read_manifest(prefix)
            if found is None or not all(path.exists() for path in _files_of(prefix)):
                return False
            if any(path.stat().st_size != found[path.suffix[1:]]["size"] for path in _files_of(prefix)[:2]):
                return False
        return True

    def _sample(self) -> list[str]:
        if self.encoding.engine == "tokenizers" or self.encoding.tokenizer.kind != "HuggingFaceTokenizer":
            return []
        if self._from_standard_input:
            return []
        for batch in read_batches(self.segments, list(self.encoding.keys), self.encoding.text_split):
            texts, _ = parse(batch, list(self.encoding.keys), self.encoding.text_split)
            found, size = [], 0
            for text in texts[0]:
                if size + len(text) <= SAMPLE_BYTES:
                    found.append(text)
                    size += len(text)
            return found
        return []

    def _config(self, encoder: Encoder) -> dict[str, Any]:
        """What decides the output; a resumed run has to have the same."""
        sources = [[source.path, source.format, source.size, source.mtime_ns] for source in self.sources]
        return {
            "format": STATE_FORMAT,
            "inputs": _digest(sources),
            "keys": list(self.encoding.keys),
            "text split": self.encoding.text_split,
            "tokenizer": encoder.tokenizer.fingerprint,
            "BOS and EOS": [encoder.head, encoder.tail],
            "filters": asdict(self.encoding.filters),
            "shard": list(self.job.shard),
            "dedup": self.job.dedup,
        }

    def _require_same(self, earlier: dict[str, Any] | str | None) -> None:
        if earlier in (self.config, _digest(self.config)):
            return
        if isinstance(earlier, dict):
            changed = ", ".join(name for name, value in self.config.items() if earlier.get(name) != value)
            raise ValueError(
                f"--resume: the unfinished run in {self.work.path} was another one (changed: {changed}). Give the same "
                "inputs and flags, or --overwrite to start over."
            )
        raise ValueError(
            f"--resume: {self.prefixes[0]}.bin is complete, but of other inputs or flags. Give --overwrite to replace "
            "it, or another --output-prefix."
        )

    def bytes_left(self) -> int:
        """Bytes of input that are still to be read, about."""
        return 0 if self.complete else total_bytes(self.segments[self.done.position.segment :])

    @property
    def done(self) -> Done:
        """What is safe on disk."""
        if "done" in self.state:
            return Done.from_state(self.state["done"])
        return Done(tuple(Totals() for _ in self.encoding.keys))

    @property
    def documents(self) -> int:
        """Documents that are safe on disk, under the key that has most."""
        return self.done.documents

    @property
    def resumable(self) -> bool:
        """Whether there is unfinished work on disk that --resume continues."""
        return bool(self.state) and self.work.exists

    @property
    def _from_standard_input(self) -> bool:
        return any(source.path == STANDARD_INPUT for source in self.sources)

    # --- the work --------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Encoded], None] = lambda encoded: None) -> list[dict[str, Any]]:
        """Write the data sets; returns their manifests.

        progress is called after each batch. Raises ValueError at a bad record unless they are skipped; OSError as it
        comes, such as for a full disk. An interrupted run can be resumed from the last state.
        """
        if not self.complete:
            if self.state.get("phase") != "publish":
                self._write(progress)
            self.work.publish(self.state["names"], [] if self.done.skipped else [self.report.name])
        return [found for prefix in self.prefixes if (found := manifest.read_manifest(prefix))]

    def _write(self, progress: Callable[[Encoded], None]) -> None:
        output = Output(self.work.path, self.encoders[0].dtype, self.job.dedup, self.done)
        try:
            try:
                self._encode(output, progress)
                self._require_documents(output.done)
            except BaseException:
                if output.done.documents and not self._from_standard_input:
                    self._save(output)
                raise
            self._save(output)
            output.close()
            self.state = {**self.state, "phase": "publish", "names": self._finish(output)}
            self.work.save(self.state)
        except BaseException:
            try:
                output.close()
            finally:
                if not self.state or self._from_standard_input:
                    self.work.delete()  # it contains nothing that could be resumed
            raise

    def _require_documents(self, done: Done) -> None:
        if done.documents or self.job.shard[1] > 1:
            return
        left_out = {"bad records": done.skipped, "empty": done.totals[0].empty, **done.totals[0].filtered}
        reasons = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
        first = f" The first: {self.first_fault}" if self.first_fault else ""
        raise ValueError(
            f"no document with text in {', '.join(self.job.inputs)}; there is nothing to train on"
            + (f" (left out: {reasons}).{first}" if reasons else ".")
        )

    def _encode(self, output: Output, progress: Callable[[Encoded], None]) -> None:
        position = output.done.position
        batches = read_batches(self.segments, list(self.encoding.keys), self.encoding.text_split, position)
        saved = time.monotonic()
        encoded_batches = in_order(batches, self.encoders)
        try:
            for encoded in encoded_batches:
                if encoded.faults:
                    self.first_fault = self.first_fault or str(encoded.faults[0])
                    if not self.encoding.skip_faults:
                        raise ValueError(self.first_fault)
                output.add(encoded)
                progress(encoded)
                if time.monotonic() - saved >= self.job.save_every and not self._from_standard_input:
                    self._save(output)
                    saved = time.monotonic()
        finally:
            encoded_batches.close()  # type: ignore[attr-defined]

    def _save(self, output: Output) -> None:
        state = {"config": self.config, "phase": "write", "done": output.sync()}
        self.work.save(state)
        self.state = state

    def _finish(self, output: Output) -> dict[str, str]:
        """Make the index, the report and the manifest of each data set; returns the final name of each file."""
        names: dict[str, str] = {}
        for number, (prefix, writer) in enumerate(zip(self.prefixes, output.writers, strict=True)):
            files, duplicates = writer.prefix, None
            writer.finish()
            if self.job.dedup:
                files, duplicates = remove_duplicates(files, self.work.path / f"{number}.digests")
            fields = self._fields(number, output, duplicates)
            text = manifest.to_json(manifest.describe(prefix, files, **fields))
            with (self.work.path / f"{number}.json").open("wb") as stream:
                stream.write(text)
                to_disk(stream)
            names |= {bin_path(files).name: bin_path(prefix).name, idx_path(files).name: idx_path(prefix).name}
            names |= {f"{number}.json": manifest.manifest_path(prefix).name}
        return names if not output.done.skipped else {"skipped.jsonl": self.report.name, **names}

    def _fields(self, number: int, output: Output, duplicates: int | None) -> dict[str, Any]:
        totals, encoder = output.done.totals[number], self.encoders[0]
        entry = manifest.tokenizer_entry(
            encoder.tokenizer, self.encoding.tokenizer, self.encoding.prepend_bos, self.encoding.append_eod
        )
        marks = totals.documents * (len(encoder.head) + len(encoder.tail))
        return {
            "key": self.encoding.keys[number],
            "tokenizer": entry,
            "encoded": {
                **asdict(totals),
                "bytes_per_token": totals.text_bytes / (totals.tokens - marks) if totals.tokens > marks else None,
            },
            "duplicates": duplicates,
            "skipped": output.done.skipped,
            "shard": f"{self.job.shard[0]}/{self.job.shard[1]}",
            "inputs": [
                _input(segment, found) for segment, found in zip(self.segments, output.checksums(), strict=True)
            ],
            "command": list(self.job.command),
            "config": _digest(self.config),
        }


def remove_duplicates(prefix: Path, digests: Path) -> tuple[Path, int]:
    """Write the first of equal documents of a data set as PREFIX.unique; returns it and their number.

    digests: a file of :func:`dedup.digests`, one for each document.
    """
    index = read_index(prefix)
    count = len(index.lengths)
    keep_path = digests.with_name(digests.name + ".keep")
    keep = np.memmap(keep_path, dtype=bool, mode="w+", shape=(count,)) if count else np.empty(0, dtype=bool)
    duplicates = dedup.mark_first(digests, keep)
    name = prefix.name + ".unique"
    with IndexedWriter(prefix.parent, name, index.dtype) as writer:
        dedup.copy_kept(prefix, index.lengths, keep, writer)
        writer.finish()
    return prefix.with_name(name), duplicates


def _input(segment: Segment, checksum: str) -> dict[str, Any]:
    """An input in the manifest, with what was read of it."""
    entry: dict[str, Any] = {"path": segment.source.path, "size": segment.source.size, "checksum": checksum}
    return entry if segment.end is None else entry | {"start": segment.start, "end": segment.end}


def _files_of(prefix: Path) -> tuple[Path, Path, Path]:
    return bin_path(prefix), idx_path(prefix), manifest.manifest_path(prefix)


def _digest(config: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _check(job: Job) -> None:
    index, count = job.shard
    if job.workers < 1:
        raise ValueError(f"--workers {job.workers}: at least one thread has to work.")
    most = 8 * len(os.sched_getaffinity(0))
    if job.workers > most:
        raise ValueError(
            f"--workers {job.workers}: at most {most} here, eight for each core; use --shard on more nodes."
        )
    if not (math.isfinite(job.save_every) and job.save_every >= 0):
        raise ValueError(f"--save-every {job.save_every}: it is a number of seconds, 0 or more.")
    if job.encoding.memory_limit < 1:
        raise ValueError("--tokenizer-memory: it is a number of megabytes above 0.")
    for key in job.encoding.keys:
        if not key or "/" in key or "\0" in key:
            raise ValueError(f"--text-key {key!r}: it becomes part of a file's name, so it has no / and is not empty.")
    if not 0 <= index < count:
        raise ValueError(f"--shard {index}/{count}: shards are counted from 0, so the first is 0/{count}.")
    if job.dedup and count > 1:
        raise ValueError(
            "--dedup with --shard would miss documents that are in two shards; give --dedup to tools/merge_datasets.py."
        )
    if job.resume and STANDARD_INPUT in job.inputs:
        raise ValueError("--resume: standard input cannot be read again from its beginning; write it to a file first.")
    if job.resume and job.overwrite:
        raise ValueError("--resume continues an earlier run, and --overwrite discards it: give one of them.")
    if len(set(job.encoding.keys)) < len(job.encoding.keys):
        raise ValueError(f"--text-key {' '.join(job.encoding.keys)}: a key is named twice.")


def total_bytes(segments: list[Segment]) -> int:
    """Bytes on disk that the segments cover."""
    return sum(_bytes_of(segment.source, segment) for segment in segments)


def _bytes_of(source: Source, segment: Segment) -> int:
    if segment.end is None or source.format == "parquet":
        return source.size
    return segment.end - segment.start
