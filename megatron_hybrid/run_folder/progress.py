"""How far a run is and how fast it goes, from the files of its folder."""

import math
import statistics
import time
from datetime import datetime
from pathlib import Path

from megatron_hybrid.run_folder.checkpoints import pointer
from megatron_hybrid.run_folder.metrics_file import Follower, Metrics, Record
from megatron_hybrid.run_folder.run_info import read_run_info
from megatron_hybrid.run_folder.state import State, read_state

KEPT = ("loss", "grad_norm", "tokens_per_second", "tokens", "skipped", "seconds", "time")
"""Of each step: a long run has hundreds of thousands."""
RECENT = 50
"""Steps over which speeds are stated."""
SILENT_S, SILENT_STEPS = 300.0, 20
"""A run whose state is running, and that has written nothing for as long as both, is called silent."""


class Progress:
    """The content of a run's files, refreshed by :meth:`update`."""

    def __init__(self, run: Path, name: str = ""):
        self.run, self.name = run, name or run.resolve().name
        self.state: State | None = None
        self.checkpoint: int | str | None = None
        """The checkpoint that the pointer names."""
        self.train_iters: int | None = None
        self.written: float | None = None
        """When the last record was written, in seconds since 1970."""
        self._follower = Follower(run / "metrics.jsonl", KEPT)

    @property
    def metrics(self) -> Metrics:
        return self._follower.metrics

    def update(self) -> None:
        """Reads what is new."""
        self.state, self.checkpoint = read_state(self.run), pointer(self.run)
        for record in self._follower.records():  # after the state: if that says finished, all of them are here
            self.written = record.get("time", self.written)
        told = read_run_info(self.run).get("args", {}).get("train_iters")
        self.train_iters = self.state.train_iters if self.state and self.state.train_iters else told

    @property
    def over(self) -> bool:
        """Whether no more records will come; a stopped run may be restarted."""
        return self.state is not None and self.state.status in ("finished", "failed")

    @property
    def iteration(self) -> int:
        """The last one that is done; if the run has just resumed, that of its checkpoint."""
        started = self.metrics.starts[-1]["resume"] if self.metrics.starts else 0
        return next(reversed(self.metrics.train), started)

    def seconds_per_iteration(self) -> float | None:
        """By the clock, with saves and validations, over the last steps since the last start; None if not known."""
        started = self.metrics.starts[-1]["resume"] if self.metrics.starts else 0
        recent = [(i, r) for i, r in _last(self.metrics.train) if i > started and r.get("time")]
        if len(recent) < 2:
            return _median([r["seconds"] for _, r in recent if r.get("seconds")])
        (first, begun), (last, ended) = recent[0], recent[-1]
        return (ended["time"] - begun["time"]) / (last - first)

    def facts(self, now: float | None = None) -> dict[str, str]:
        """What to show, by title; unknown facts are omitted. ``now``: seconds since 1970."""
        now = time.time() if now is None else now
        step = self.metrics.train.get(self.iteration, {})
        pace = self.seconds_per_iteration()
        speed = _median([r["tokens_per_second"] for _, r in _last(self.metrics.train) if r.get("tokens_per_second")])
        validation = next(reversed(self.metrics.validation.items()), None)
        found = {
            "state": self._state(now, pace),
            "iteration": self._iteration(),
            "tokens": short(step["tokens"]) if step.get("tokens") else "",
            "loss": f"{step['loss']:.4f}" if step else "",
            "validation": f"{validation[1]:.4f} at {validation[0]:,}" if validation else "",
            "grad norm": f"{step['grad_norm']:.3g}" if step.get("grad_norm") is not None else "",
            "speed": f"{short(speed)} tokens/s" if speed else "",
            "step": f"{pace:.3g} s" if pace else "",
            "left": self._left(now, pace),
            "checkpoint": f"{self.checkpoint:,}" if isinstance(self.checkpoint, int) else self.checkpoint or "none",
            "starts": self._starts(),
            "skipped": _places([i for i, r in self.metrics.train.items() if r.get("skipped")]),
            "not finite": _places([i for i, r in self.metrics.train.items() if not math.isfinite(r["loss"])]),
        }
        return {title: text for title, text in found.items() if text}

    def _state(self, now: float, pace: float | None) -> str:
        if self.state is None:
            return "no state.json"
        text = self.state.status + (f" ({self.state.reason})" if self.state.reason else "")
        silent = now - max(self.written or 0, self.state.time)
        if self.state.status == "running" and silent > max(SILENT_S, SILENT_STEPS * (pace or 0)):
            text += f", silent for {duration(silent)}"
        return text

    def _iteration(self) -> str:
        if not self.train_iters:
            return f"{self.iteration:,}"
        return f"{self.iteration:,} of {self.train_iters:,} ({self.iteration / self.train_iters:.1%})"

    def _left(self, now: float, pace: float | None) -> str:
        left = (self.train_iters or 0) - self.iteration
        if pace is None or left <= 0 or self.state is None or self.state.status != "running":
            return ""
        end = datetime.fromtimestamp(now + pace * left)
        return f"{duration(pace * left)}, until {end:%a %d %b %H:%M}"

    def _starts(self) -> str:
        resumed = [start["resume"] for start in self.metrics.starts[1:]]
        count = len(self.metrics.starts)
        return f"{count}, from {', '.join(f'{i:,}' for i in resumed[-3:])}" if resumed else str(count or "")


def short(number: float) -> str:
    """1234567 -> 1.23 M, and k, B (1e9), T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Its two largest units: 93784 -> 1 d 2 h."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    while parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number)


def _last(train: dict[int, Record]) -> list[tuple[int, Record]]:
    found = []
    for item in reversed(train.items()):
        found.append(item)
        if len(found) == RECENT:
            break
    return found[::-1]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _places(iterations: list[int]) -> str:
    """How many, and the last of them."""
    return f"{len(iterations):,}, the last at {iterations[-1]:,}" if iterations else ""
