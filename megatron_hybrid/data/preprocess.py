"""From a corpus to data sets on disk: in order, in bounded memory, and safe to interrupt at any moment."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_hybrid.data import dedup, manifest
from megatron_hybrid.data.batches import BEGINNING, read_batches, shard
from megatron_hybrid.data.documents import Fault, parse
from megatron_hybrid.data.encode import Documents, Encoded, Encoder, Encoding, in_order, make_encoders
from megatron_hybrid.data.indexed import IndexedWriter, Sizes, bin_path, idx_path, open_at, read_index, to_disk
from megatron_hybrid.data.sources import STANDARD_INPUT, Position, Segment, Source, find_sources
from megatron_hybrid.data.work import WorkFolder

SAMPLE_BYTES = 250_000
"""Text at the start of the corpus on which gigatoken is checked."""


@dataclass(frozen=True)
class Job:
    """All that a run of preprocessing is told."""

    inputs: tuple[str, ...]
    prefix: Path
    """The data sets are PREFIX_KEY_document."""
    encoding: Encoding
    input_format: str = "auto"
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    """Index and number of shards."""
    skip_faults: bool = False
    """Leave bad records out and list them in a report, rather than stop at the first."""
    dedup: bool = False
    resume: bool = False
    overwrite: bool = False
    save_every: float = 10.0
    """Seconds between two states on disk."""
    command: tuple[str, ...] = ()


@dataclass
class Totals:
    """What a key of the corpus came to, so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def add(self, new: Documents) -> None:
        """Count one batch."""
        self.documents += len(new.lengths)
        self.tokens += new.ids.size
        self.text_bytes += new.text_bytes
        self.empty += new.empty
        for rule, count in new.filtered.items():
            self.filtered[rule] = self.filtered.get(rule, 0) + count


class Stopped(ValueError):
    """A run that ended early; what it did is on disk and can be resumed."""


class Preprocessing:
    """One run: plan it (:meth:`start`), then do it (:meth:`run`)."""

    def __init__(self, job: Job) -> None:
        """Find the inputs and name the outputs; raises ValueError for a user's mistake. Nothing is written."""
        _check(job)
        self.job, self.encoding = job, job.encoding
        self.sources, self.passed_over = find_sources(job.inputs, job.input_format)
        index, count = job.shard
        self.segments = shard(self.sources, index, count, self.encoding.text_split)
        suffix = f".shard-{index:05}-of-{count:05}" if count > 1 else ""
        self.prefixes = [
            job.prefix.with_name(f"{job.prefix.name}_{key}_document{suffix}") for key in self.encoding.keys
        ]
        name = f"{job.prefix.name}_{'_'.join(self.encoding.keys)}_document{suffix}"
        self.work = WorkFolder(job.prefix.with_name(f".{name}.unfinished"))
        self.report = job.prefix.with_name(f"{name}.skipped.jsonl")
        if job.dedup:
            self.encoding = Encoding(**{**vars(self.encoding), "digests": True})

    # --- before the work -------------------------------------------------------------------------------

    def start(self) -> str:
        """Take up an earlier run or begin a new one; returns a line that says which.

        Raises ValueError if outputs exist, an earlier run was different, or the tokenizer cannot do what is asked.
        """
        self.encoders, self.engine = make_encoders(self.encoding, self.job.workers, self._sample())
        self.config = self._config(self.encoders[0])
        existing = [p for prefix in self.prefixes for p in (bin_path(prefix), idx_path(prefix)) if p.exists()]
        self.complete = False
        if (existing or self.work.exists) and not (self.job.resume or self.job.overwrite):
            what = f"{existing[0]} exists" if existing else f"an unfinished run left {self.work.path}"
            remedy = "--overwrite to begin anew" if existing else "--resume to continue, or --overwrite to begin anew"
            raise ValueError(f"{what}; give {remedy}, or another --output-prefix.")
        self.work.path.parent.mkdir(parents=True, exist_ok=True)
        state = self.work.open()
        self.state: dict[str, Any] = {}
        if self.job.resume and state is None and existing:
            self._require_same(self._finished_config())
            self.work.delete()
            self.complete = True
            return "complete already; nothing to do"
        if self.job.resume and state is not None:
            self._require_same(state["config"])
            self.state = state
            done = state["totals"][0]["documents"]
            return f"resumed after {done:,} documents"
        self.work.clear()
        return "nothing to resume, so from the start" if self.job.resume else ""

    def _sample(self) -> list[str]:
        if self.encoding.engine == "tokenizers" or self.encoding.tokenizer.kind != "HuggingFaceTokenizer":
            return []
        if any(source.path == STANDARD_INPUT for source in self.sources):
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
            "inputs": sources,
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
                "inputs and flags, or --overwrite to begin anew."
            )
        raise ValueError(
            f"--resume: {self.prefixes[0]}.bin is complete, but of other inputs or flags. Give --overwrite to replace "
            "it, or another --output-prefix."
        )

    def _finished_config(self) -> str | None:
        found = manifest.read_manifest(self.prefixes[-1])
        return found.get("config") if found else None

    def bytes_left(self) -> int:
        """Bytes of input that are still to be read, about."""
        left = self.segments[self.state["position"][0] :] if self.state else self.segments
        return 0 if self.complete else total_bytes(left)

    @property
    def resumable(self) -> bool:
        """Whether there is unfinished work on disk that --resume continues."""
        return bool(self.state) and not any(source.path == STANDARD_INPUT for source in self.sources)

    @property
    def documents(self) -> int:
        """Documents that are safe on disk, under the key that has most."""
        return max(entry["documents"] for entry in self.state["totals"]) if self.state else 0

    @property
    def skipped(self) -> int:
        """Bad records that were left out."""
        return self.state.get("skipped", 0)

    @property
    def corrected(self) -> int:
        """Texts whose ids gigatoken got wrong, and which --verify-tokens corrected."""
        return self.state.get("corrected", 0)

    # --- the work --------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Encoded], None] = lambda encoded: None) -> list[dict[str, Any]]:
        """Write the data sets; returns their manifests.

        progress is called after each batch. Raises ValueError at a bad record unless they are skipped; OSError as it
        comes, such as for a full disk. Whatever ends the run early, its work can be resumed from the last state.
        """
        if self.complete:
            return [found for prefix in self.prefixes if (found := manifest.read_manifest(prefix))]
        if self.state.get("phase") != "publish":
            self._write(progress)
        self.work.publish(self.state["names"])
        return [found for prefix in self.prefixes if (found := manifest.read_manifest(prefix))]

    def _write(self, progress: Callable[[Encoded], None]) -> None:
        output = _Output(self, self.state)
        try:
            try:
                self._encode(output, progress)
            except BaseException:
                if output.documents or self.state:
                    self._save(output)
                raise
            if not output.documents and self.job.shard[1] == 1:
                names = ", ".join(self.job.inputs)
                raise ValueError(f"no document with text in {names}; there is nothing to train on.")
        except BaseException:
            output.close()
            if not self.state:
                self.work.delete()  # nothing was done that would be worth keeping
            raise
        self._save(output)
        output.close()
        self.state = {**self.state, "phase": "publish", "names": self._finish(output)}
        self.work.save(self.state)

    def _encode(self, output: "_Output", progress: Callable[[Encoded], None]) -> None:
        batches = read_batches(self.segments, list(self.encoding.keys), self.encoding.text_split, output.position)
        saved = time.monotonic()
        encoded_batches = in_order(batches, self.encoders)
        try:
            for encoded in encoded_batches:
                if encoded.faults and not self.job.skip_faults:
                    raise Stopped(str(encoded.faults[0]))
                output.add(encoded)
                progress(encoded)
                if time.monotonic() - saved >= self.job.save_every:
                    self._save(output)
                    saved = time.monotonic()
        finally:
            encoded_batches.close()  # type: ignore[attr-defined]

    def _save(self, output: "_Output") -> None:
        output.sync()
        self.state = output.state(self.config)
        self.work.save(self.state)

    def _finish(self, output: "_Output") -> dict[str, str]:
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
        return names if not output.skipped else {"skipped.jsonl": self.report.name, **names}

    def _fields(self, number: int, output: "_Output", duplicates: int | None) -> dict[str, Any]:
        totals, encoder = output.totals[number], self.encoders[0]
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
            "skipped": output.skipped,
            "shard": f"{self.job.shard[0]}/{self.job.shard[1]}",
            "inputs": output.inputs(),
            "command": list(self.job.command),
            "config": _digest(self.config),
        }


class _Output:
    """The unfinished files of a run, and how far they are."""

    def __init__(self, run: Preprocessing, state: dict[str, Any]) -> None:
        self.segments, folder = run.segments, run.work.path
        keys = range(len(run.encoding.keys))
        self.position = Position(*state.get("position", BEGINNING))
        self.totals = [Totals(**entry) for entry in state["totals"]] if state else [Totals() for _ in keys]
        self.checksums: list[str] = state.get("checksums", [])
        self.skipped: int = state.get("skipped", 0)
        self.corrected: int = state.get("corrected", 0)
        self.report_bytes: int = state.get("report bytes", 0)
        with ExitStack() as opened:
            self.writers = [
                opened.enter_context(IndexedWriter(folder, str(k), run.encoders[0].dtype, Sizes(t.documents, t.tokens)))
                for k, t in enumerate(self.totals)
            ]
            self.report: BinaryIO = opened.enter_context(open_at(folder / "skipped.jsonl", self.report_bytes))
            self.digests: list[BinaryIO] = [
                opened.enter_context(open_at(folder / f"{k}.digests", self.totals[k].documents * dedup.DIGEST_BYTES))
                for k in (keys if run.job.dedup else ())
            ]
            self._opened = opened.pop_all()

    @property
    def documents(self) -> int:
        return max(totals.documents for totals in self.totals)

    def add(self, encoded: Encoded) -> None:
        """Append what became of one batch."""
        for key, documents in enumerate(encoded.documents):
            self.writers[key].add(documents.ids, documents.lengths)
            self.totals[key].add(documents)
            if self.digests:
                self.digests[key].write(documents.digests)
        for fault in encoded.faults:
            self.report_bytes += self.report.write(json.dumps(_entry(fault), ensure_ascii=False).encode() + b"\n")
        self.skipped += len(encoded.faults)
        self.corrected += encoded.corrected
        if encoded.batch.end.segment > self.position.segment:
            self.checksums.append(encoded.batch.checksum)
        self.position = encoded.batch.end

    def sync(self) -> None:
        """Bring everything to disk."""
        for writer in self.writers:
            writer.sync()
        for stream in (self.report, *self.digests):
            to_disk(stream)

    def state(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a later run needs to go on from here; the files have to be on disk."""
        return {
            "config": config,
            "phase": "write",
            "position": list(self.position),
            "totals": [asdict(totals) for totals in self.totals],
            "checksums": self.checksums,
            "skipped": self.skipped,
            "corrected": self.corrected,
            "report bytes": self.report_bytes,
        }

    def close(self) -> None:
        """Close the files; sync before, if they are to be kept."""
        self._opened.close()

    def inputs(self) -> list[dict[str, Any]]:
        """The inputs, with what was read of each; without a checksum where a damaged file was given up."""
        found = []
        for segment, checksum in zip(self.segments, self.checksums, strict=True):
            entry: dict[str, Any] = {"path": segment.source.path, "size": segment.source.size, "checksum": checksum}
            if segment.end is not None:
                entry |= {"start": segment.start, "end": segment.end}
            found.append(entry)
        return found


def remove_duplicates(prefix: Path, digests: Path) -> tuple[Path, int]:
    """Write the documents of a data set that are the first of their kind as PREFIX.unique; returns it and their number.

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


def _entry(fault: Fault) -> dict[str, Any]:
    return {"file": fault.path, fault.unit: fault.record, "reason": fault.reason}


def _digest(config: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _check(job: Job) -> None:
    index, count = job.shard
    if job.workers < 1:
        raise ValueError(f"--workers {job.workers}: at least one thread has to work.")
    if not 0 <= index < count:
        raise ValueError(f"--shard {index}/{count}: shards are counted from 0, so the first is 0/{count}.")
    if job.dedup and count > 1:
        raise ValueError(
            "--dedup with --shard would miss documents that are in two shards; give --dedup to tools/merge_datasets.py."
        )
    if job.resume and STANDARD_INPUT in job.inputs:
        raise ValueError("--resume: standard input cannot be read again from its beginning; write it to a file first.")
    if job.resume and job.overwrite:
        raise ValueError("--resume continues an earlier run, and --overwrite throws it away: give one of them.")
    if len(set(job.encoding.keys)) < len(job.encoding.keys):
        raise ValueError(f"--text-key {' '.join(job.encoding.keys)}: a key is named twice.")


def total_bytes(segments: list[Segment]) -> int:
    """Bytes on disk that the segments cover."""
    return sum(_bytes_of(segment.source, segment) for segment in segments)


def _bytes_of(source: Source, segment: Segment) -> int:
    if segment.end is None or source.format == "parquet":
        return source.size
    return segment.end - segment.start
