"""metrics.jsonl: the metrics of a run, one JSON object per line.

Records of steps, of validations and of starts, in the order of writing; training/metrics.py says
what they contain. The file is append-only. A run that returns to a checkpoint repeats steps: records of iterations
beyond the checkpoint are then no longer part of the run, whether these have been repeated or not.
"""

import json
import math
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Balance(NamedTuple):
    """How evenly a layer's tokens are routed to its experts."""

    max_over_mean: float
    """The busiest expert's share over an even one: 1 is even, the number of experts all to one."""
    entropy: float
    """Of the shares, over the largest that it can be: 1 is even, 0 all to one."""


def balance(shares: list[float]) -> Balance:
    """Of the share of tokens of each expert of a layer (record ``expert_loads``); they add up to 1."""
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return Balance(max(shares) * len(shares), entropy / math.log(len(shares)) if len(shares) > 1 else 1.0)


@dataclass
class Metrics:
    """The records that count: the last of each iteration."""

    train: dict[int, Record] = field(default_factory=dict)
    """By iteration, in order, without expert_loads. Keys: iteration, loss, tokens (all so far), grad_norm, ..."""
    validation: dict[int, float] = field(default_factory=dict)
    """Loss by iteration, in order, of the first validation set: the one that is followed where there are several."""
    max_over_mean: dict[int, dict[str, float]] = field(default_factory=dict)
    """Of each layer of experts (:class:`Balance`), by iteration, in order."""
    expert_loads: dict[str, list[float]] = field(default_factory=dict)
    """The newest: layer to the share of tokens of each expert. Those of a long run are too many to keep."""
    starts: list[Record] = field(default_factory=list)
    """All of them. Keys: resume (the iteration that the run resumed from; 0 for a new one), time, processes, ..."""

    def add(self, record: Record, keep: Collection[str] | None = None) -> None:
        """Takes the next record of the file; ``keep``: all that is kept of a step."""
        if is_start(record):
            self.starts.append(record)
            self._forget_beyond(record["resume"])
            return
        iteration = record["iteration"]
        if is_step(record):
            if self.train and iteration <= next(reversed(self.train)):
                self._forget_beyond(iteration - 1)  # the record of the start could not be written
            self._add_loads(iteration, record.get("expert_loads"))
            kept = record if keep is None else keep
            self.train[iteration] = {key: record[key] for key in kept if key in record and key != "expert_loads"}
        elif record.get("validation", "validation") == "validation" and record.get("validation_loss") is not None:
            self.validation.pop(iteration, None)  # keeps the order
            self.validation[iteration] = record["validation_loss"]

    def _add_loads(self, iteration: int, loads: dict[str, list[float]] | None) -> None:
        if loads:
            self.expert_loads = loads
            self.max_over_mean[iteration] = {layer: balance(shares).max_over_mean for layer, shares in loads.items()}

    def _forget_beyond(self, iteration: int) -> None:
        if self.max_over_mean and next(reversed(self.max_over_mean)) > iteration:
            self.expert_loads = {}
        for records in (self.train, self.validation, self.max_over_mean):
            while records and next(reversed(records)) > iteration:
                records.popitem()


def is_step(record: Record) -> bool:
    """Whether a record is of a training step."""
    return record.get("loss") is not None


def is_start(record: Record) -> bool:
    """Whether a record says that processes have started, and from where."""
    return "resume" in record


def records_of(line: bytes) -> list[Record]:
    """The record of a line; none if it is not one: a process that was killed leaves a partial line."""
    try:
        record = json.loads(line)
    except ValueError:
        return []
    known = isinstance(record, dict) and any(type(record.get(key)) is int for key in ("iteration", "resume"))
    return [record] if known else []


class Follower:
    """Reads a metrics file incrementally, while a run writes it."""

    def __init__(self, path: Path, keep: Collection[str] | None = None):
        """``keep``: all that is kept of a step, since a long run has many."""
        self.path, self.metrics = path, Metrics()
        self._keep = keep
        self._offset, self._file = 0, (0, 0)

    def update(self) -> None:
        """Adds the complete lines that were appended since the last call to ``metrics``."""
        for _ in self.records():
            pass

    def records(self) -> Iterator[Record]:
        """The same, with each record when it has been taken, all that is in it.

        It starts over if the file was replaced or truncated. Without a file there is nothing new.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
                self._file, self._offset, self.metrics = (stat.st_dev, stat.st_ino), 0, Metrics()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # its rest may still come
                self._offset += len(line)
                for record in records_of(line):
                    self.metrics.add(record, self._keep)
                    yield record


def read_metrics(path: Path) -> Metrics:
    """What counts in a metrics file; nothing if there is no file."""
    follower = Follower(path)
    follower.update()
    return follower.metrics


class Appender:
    """Appends records to a metrics file. If that fails, training continues without them."""

    def __init__(self, path: Path):
        self.path = path
        self._in_doubt = True
        """Whether the file may end in a partial line: of a process that was killed, or of a full disk."""
        self._warned = False

    def append(self, record: Record) -> str:
        """Writes a record with the ``time`` (seconds since 1970) as one line, by one call.

        Returns:
            A message for the log, the first time that it cannot be written.
        """
        line = json.dumps({**record, "time": time.time()}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                if self._in_doubt and file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                written = file.write(line)
            self._in_doubt = written != len(line)
            reason = "the disk is full: a record was written in part" if self._in_doubt else ""
        except OSError as error:
            self._in_doubt, reason = True, str(error)
        if not reason or self._warned:
            return ""
        self._warned = True
        return f"WARNING: {self.path} misses records from here on: {reason}. Training continues; this is logged once."
