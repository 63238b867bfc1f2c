"""state.json: how far a run is. Exit codes do not tell a stopped run from a finished one."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from megatron_hybrid.files import atomic_write

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run last said of itself."""

    status: Status
    """finished: all iterations are done, and saved if the run saves. stopped: it ended early and in order, with a
    checkpoint. failed: it gave up, and starting it again as it is would not help. running: its ranks are at work, or
    died without a word."""
    reason: str = ""
    """Why it is stopped or failed: ``signal``, ``flag`` (such as --exit-interval) or ``result validation``."""
    iteration: int | None = None
    """The last one that is done."""
    train_iters: int | None = None
    """All that are to be done."""
    time: float = field(default_factory=time.time)
    """When this was said, in seconds since 1970."""


def write_state(run: Path, state: State) -> None:
    """Replaces state.json as a whole."""
    with atomic_write(run / "state.json") as file:
        file.write((json.dumps(asdict(state)) + "\n").encode())


def read_state(run: Path) -> State | None:
    """What state.json says; None if there is none that can be read."""
    try:
        said = json.loads((run / "state.json").read_text("utf-8"))
        state = State(**said)
    except (OSError, ValueError, TypeError):
        return None
    return state if state.status in get_args(Status) else None
