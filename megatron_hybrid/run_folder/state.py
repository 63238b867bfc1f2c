"""state.json: the progress of a run. Exit codes do not distinguish a stopped run from a finished one."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from megatron_hybrid.files import atomic_write

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class State:
    """The last state that a run has written."""

    status: Status
    """finished: all iterations are done, and saved if the run saves. stopped: it ended early and in order, with a
    checkpoint. failed: it ended with an error, and restarting it unchanged would not help. running: its ranks are
    running, or were killed."""
    reason: str = ""
    """Why it is stopped or failed: ``signal``, ``flag`` (such as --exit-interval) or ``result validation``."""
    iteration: int | None = None
    """The last one that is done."""
    train_iters: int | None = None
    """All that are to be done."""
    time: float = field(default_factory=time.time)
    """When this was written, in seconds since 1970."""


def write_state(run: Path, state: State) -> None:
    """Replaces state.json atomically."""
    with atomic_write(run / "state.json") as file:
        file.write((json.dumps(asdict(state)) + "\n").encode())


def read_state(run: Path) -> State | None:
    """The content of state.json; None if it is missing or cannot be read."""
    try:
        said = json.loads((run / "state.json").read_text("utf-8"))
        state = State(**said)
    except (OSError, ValueError, TypeError):
        return None
    return state if state.status in get_args(Status) else None
