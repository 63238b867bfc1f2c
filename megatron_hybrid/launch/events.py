"""events_NODE.jsonl in a job's folder of logs: signals and failed ranks, one line each, appended by the node."""

import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event on a node."""

    kind: Literal["signal", "death"]
    """signal: the agent was asked to stop. death: a rank failed."""
    node: str
    requeue: int
    """SLURM's count of starts of the job before this one."""
    restart: int = 0
    """The ranks' restarts before, within this start of the job."""
    reason: str
    rank: int | None = None
    local_rank: int | None = None
    pid: int | None = None
    code: int | None = None
    """Exit code; negative: the number of the signal that ended the rank."""
    last_words: str = ""
    """Of the rank's log: its exception, or the last line."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970, by the node's clock."""


def append(folder: Path, event: Event) -> None:
    """Adds a line to the node's own file: network file systems lose lines that several nodes append to one."""
    line = json.dumps({k: v for k, v in asdict(event).items() if v not in (None, "")}) + "\n"
    descriptor = os.open(folder / f"events_{event.node}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[Event]:
    """All nodes' events by time; incomplete lines are skipped."""
    events = []
    for path in folder.glob("events_*.jsonl"):
        with suppress(OSError):
            for line in path.read_text("utf-8", "replace").splitlines():
                with suppress(ValueError, TypeError):
                    events.append(Event(**json.loads(line)))
    return sorted(events, key=lambda event: event.time)


def reason(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return {
            2: "exit code 2: a mistake in the flags or files",
            16: "exit code 16: a bad step, with the same result when repeated",
            17: "exit code 17: a bad step, with another result when repeated, or not repeated",
        }.get(code, f"exit code {code}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "SIGKILL: kill -9, or the kernel's out-of-memory killer (dmesg on the node says which)"
    return name


def last_words(log: Path) -> str:
    """The last exception in a log, or its last line; at most 300 characters."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 16384))
            lines = [line.strip() for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)
    ]
    return (errors or lines or [""])[-1][:300]
