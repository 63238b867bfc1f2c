"""Whether a job is requeued after its end, to resume from the last checkpoint."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hybrid.launch.events import Event
from megatron_hybrid.run_folder.state import State

FINAL_CODES = (2, 16, 17)
"""Exit codes of ranks that would recur in a new start: a user's mistake, and bad steps (training/bad_steps.py, by
the codes of core/rerun_state_machine.py)."""


@dataclass(frozen=True)
class Next:
    """What comes after a job's end."""

    requeue: bool
    why: str
    code: int
    """The launcher's exit code."""


def decide(
    state: State | None, code: int, signalled: bool, seen: Sequence[Event], failed_starts: int, most: int
) -> Next:
    """Decides by the run's state, since a rank that was stopped exits as one that finished.

    Args:
        state: The state that the run has written in this start of the job; None if none.
        code: Exit code of srun, or of the agent.
        signalled: The job was asked to stop, by its time limit, preemption or a user.
        seen: The events of this start.
        failed_starts: Consecutive starts that trained or failed without a new checkpoint, including this one.
        most: Their maximum.
    """
    status = state.status if state else "unknown"
    final = next((event for event in seen if event.code in FINAL_CODES), None)
    if status == "finished":
        return Next(False, "all iterations are done", 0)
    if final:
        return Next(False, f"rank {final.rank} ended with {final.reason}; a restart would not help", final.code or 1)
    if state and status == "failed":
        return Next(False, f"the run failed ({state.reason}); an unchanged restart would not help", code or 1)
    if state and status == "stopped" and state.reason != "signal":
        return Next(False, f"the run stopped by itself ({state.reason})", code)
    if signalled and status == "running" and failed_starts > most:
        return Next(False, f"{failed_starts} starts in a row left no new checkpoint: the time is too short", code or 1)
    if signalled:
        saved = "saved and stopped" if status == "stopped" else "ended before it could save"
        return Next(True, f"the run was asked to stop, and {saved}", code)
    if status == "stopped":
        return Next(True, "the run was asked to stop, and saved", code)
    if code == 0:
        return Next(False, "the ranks exited with 0 without a final state", 0)
    if failed_starts > most:
        return Next(False, f"{failed_starts} starts in a row failed without a new checkpoint", code)
    return Next(True, f"the ranks failed (start {failed_starts} of at most {most} without a new checkpoint)", code)


def unless_cancelled(after: Next, job: str) -> Next:
    """The same, but without another start if a user has cancelled the job or SLURM has requeued it already.

    Args:
        job: What `scontrol show job` says: a job that SLURM is ending is COMPLETING, whether for its time limit,
            for a job of higher priority, for a node that failed, or since `scancel JOB` asked for it.
    """
    facts = dict(re.findall(r"(\w+)=(\S*)", job))
    if facts.get("Requeue") == "0":
        return Next(False, f"{after.why}; but it was submitted with --no-requeue", after.code)
    ending = facts.get("JobState") in ("COMPLETING", "CANCELLED")
    if not ending or facts.get("Reason") == "TimeLimit" or facts.get("PreemptTime", "None") != "None":
        return after
    return Next(False, "SLURM ends the job: it was cancelled, or a node failed and SLURM requeues it", after.code)
