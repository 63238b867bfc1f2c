"""One screen when a job starts, and one when it ends."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.launch.allocation import Allocation
from megatron_hybrid.launch.events import Event
from megatron_hybrid.launch.preflight import Plan
from megatron_hybrid.run_folder.checkpoints import pointer
from megatron_hybrid.run_folder.progress import Progress, duration

FACTS = ("state", "iteration", "tokens", "loss", "validation", "speed", "checkpoint")
SHOWN = 5
"""Failures that are shown: the last ones."""


def start(allocation: Allocation, plan: Plan, logs: Path, restarts: int, grace: float) -> str:
    """What will run, where, and what happens when it fails."""
    again = f" (start {allocation.requeues + 1})" if allocation.requeues else ""
    rows = [
        ("job", f"{allocation.job}{again}"),
        ("nodes", f"{_nodes(allocation.nodes)}, {allocation.processes} ranks on each"),
        ("layout", str(plan.layout)),
        ("recipe", plan.command.recipe or "none"),
        ("pattern", _short(str(plan.command.pattern))),
        ("run", str(plan.save)),
        ("checkpoint", _checkpoint(plan.save)),
        ("logs", f"{logs}/rank_*.log"),
        ("restarts", f"at most {restarts} when a rank fails; {grace:.0f} s to save after SIGTERM"),
        *(("note", note) for note in plan.notes),
    ]
    return _screen("start", rows)


def end(job: str, run: Progress, logs: Path, said: bool, seen: Sequence[Event], next_: str, seconds: float) -> str:
    """The run's progress, the first failing rank and the cause, and what happens next.

    Args:
        run: Up to date.
        said: The run has written its state since the start.
        seen: The events of this start of the job.
        next_: What happens next, and why.
        seconds: From its start to its end.
    """
    deaths = [event for event in seen if event.kind == "death"]
    facts = run.facts() | ({} if said else {"state": "unknown: the run has written nothing since this start"})
    rows = [("job", f"{job}, {duration(seconds)}")]
    rows += [(name, facts[name]) for name in FACTS if name in facts]
    rows += [("signal", f"{event.reason} on {event.node}") for event in seen if event.kind == "signal"][:1]
    firsts = {event.restart: event for event in reversed(deaths)}  # seen is in the order of time
    rows.append(("failures", f"in {len(firsts)} of the starts of all ranks" if firsts else "none"))
    for restart, event in sorted(firsts.items())[-SHOWN:]:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.time))
        rows.append(("first failure", f"rank {event.rank} on {event.node}, {when}, restart {restart}: {event.reason}"))
        if event.last_words:
            rows.append(("", _short(event.last_words)))
    rows += [("logs", str(logs)), ("next", next_)]
    return _screen("end", rows)


def _screen(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"{name:<13} {text}".rstrip() for name, text in rows]
    return "\n".join([f"==== launch: {title} {time.strftime('%Y-%m-%d %H:%M:%S')}", *lines, "===="])


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _nodes(nodes: tuple[str, ...]) -> str:
    return f"{len(nodes)} ({', '.join(nodes) if len(nodes) <= 4 else f'{nodes[0]} to {nodes[-1]}'})"


def _checkpoint(save: Path) -> str:
    found = pointer(save)
    return "none" if found is None else f"iteration {found}"
