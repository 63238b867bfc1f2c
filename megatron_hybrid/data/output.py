"""The unfinished files of a run of preprocessing, and the record of their progress."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_hybrid.data import dedup
from megatron_hybrid.data.batches import BEGINNING
from megatron_hybrid.data.documents import Fault
from megatron_hybrid.data.encode import Documents, Encoded
from megatron_hybrid.data.indexed import IndexedWriter, Sizes
from megatron_hybrid.data.sources import Position
from megatron_hybrid.files import open_at, to_disk


@dataclass(frozen=True)
class Totals:
    """Totals of a key of the corpus, so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def plus(self, new: Documents) -> "Totals":
        """Return the totals with one batch more."""
        rules = {**self.filtered, **new.filtered}
        return Totals(
            self.documents + len(new.lengths),
            self.tokens + new.ids.size,
            self.text_bytes + new.text_bytes,
            self.empty + new.empty,
            {rule: self.filtered.get(rule, 0) + new.filtered.get(rule, 0) for rule in rules},
        )


@dataclass(frozen=True)
class Done:
    """Which part of the input is in the files. It is replaced atomically, after a batch is in all of them.

    What the files have beyond these sizes, after an interruption, belongs to no batch and is truncated.
    """

    totals: tuple[Totals, ...]
    position: Position = BEGINNING
    skipped: int = 0
    corrected: int = 0
    report_bytes: int = 0
    checksum_bytes: int = 0

    @property
    def documents(self) -> int:
        """Documents under the key that has most."""
        return max(totals.documents for totals in self.totals)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Done":
        """Return what :func:`dataclasses.asdict` made of one."""
        totals = tuple(Totals(**entry) for entry in state["totals"])
        return cls(**{**state, "totals": totals, "position": Position(*state["position"])})


class Output:
    """The files: ids and lengths for each key, their digests if wanted, the report of faults, the inputs' checksums."""

    def __init__(self, folder: Path, dtype: np.dtype, digests: bool, done: Done) -> None:
        """Open the files, truncated to what is done."""
        self.done = done
        with ExitStack() as opened:
            self.writers = [
                opened.enter_context(IndexedWriter(folder, str(key), dtype, Sizes(totals.documents, totals.tokens)))
                for key, totals in enumerate(done.totals)
            ]
            self._digests: list[BinaryIO] = [
                opened.enter_context(open_at(folder / f"{key}.digests", totals.documents * dedup.DIGEST_BYTES))
                for key, totals in enumerate(done.totals)
                if digests
            ]
            self._report = opened.enter_context(open_at(folder / "skipped.jsonl", done.report_bytes))
            self._checksums = opened.enter_context(open_at(folder / "checksums", done.checksum_bytes))
            self._opened = opened.pop_all()

    def add(self, encoded: Encoded) -> None:
        """Append the result of one batch."""
        done = self.done
        for key, documents in enumerate(encoded.documents):
            self.writers[key].add(documents.ids, documents.lengths)
            if self._digests:
                self._digests[key].write(documents.digests)
        report = "".join(json.dumps(_entry(fault)) + "\n" for fault in encoded.faults).encode()
        self._report.write(report)
        ends = encoded.batch.end.segment > done.position.segment
        checksum = f"{encoded.batch.checksum}\n".encode() if ends else b""
        self._checksums.write(checksum)
        self.done = Done(
            tuple(totals.plus(new) for totals, new in zip(done.totals, encoded.documents, strict=True)),
            encoded.batch.end,
            done.skipped + len(encoded.faults),
            done.corrected + encoded.corrected,
            done.report_bytes + len(report),
            done.checksum_bytes + len(checksum),
        )

    def sync(self) -> dict[str, Any]:
        """Flush everything to disk; returns what is done, for the state."""
        done = self.done
        for writer in self.writers:
            writer.sync()
        for stream in (self._report, self._checksums, *self._digests):
            to_disk(stream)
        return asdict(done)

    def close(self) -> None:
        """Close the files; sync before, if they are to be kept."""
        self._opened.close()

    def checksums(self) -> Sequence[str]:
        """Of each segment that is done; empty if a corrupt file was abandoned."""
        path = Path(self._checksums.name)
        return path.read_text().splitlines()


def _entry(fault: Fault) -> dict[str, Any]:
    return {"file": fault.path, fault.unit: fault.record, "reason": fault.reason}
