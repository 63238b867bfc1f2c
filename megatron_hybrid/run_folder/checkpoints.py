"""The checkpoints of a run's --save folder: which exist, which to load, which to remove.

Names are upstream's: ``iter_0000030/``, ``release/``, ``latest_checkpointed_iteration.txt`` (the pointer) and
``integrity.json`` in each checkpoint (the manifest, :mod:`megatron_hybrid.run_folder.checksums`).
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_hybrid.files import atomic_write
from megatron_hybrid.run_folder.checksums import Unreachable, is_sealed, passing, problems, seal

__all__ = [
    "Checkpoint",
    "Choice",
    "Unreachable",
    "checkpoints",
    "choose",
    "is_sealed",
    "passing",
    "point_to",
    "pointer",
    "problems",
    "remove",
    "remove_old",
    "seal",
    "size",
    "sweep",
]
POINTER = "latest_checkpointed_iteration.txt"
DELETING = ".deleting-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint by its own folder."""

    folder: Path
    iteration: int
    release: bool = False
    """Only weights, from which a run starts at iteration 0."""


@dataclass(frozen=True)
class Choice:
    """What to load, and why."""

    checkpoint: Checkpoint | None
    """None: there are no checkpoints."""
    notes: list[str] = field(default_factory=list)
    """For the user."""


def checkpoints(run: Path) -> list[Checkpoint]:
    """All checkpoints of a run, valid or not, newest first; ``release`` is the oldest."""
    try:
        entries = list(os.scandir(run))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for entry in entries:
        match = re.fullmatch(r"iter_(\d{7,})|release", entry.name, re.ASCII)
        if match is None or not entry.is_dir():
            continue
        iteration = int(match[1] or 0)
        if match[1] is None or entry.name == f"iter_{iteration:07d}":
            found.append(Checkpoint(Path(run, entry.name), iteration, release=match[1] is None))
    return sorted(found, key=lambda c: (not c.release, c.iteration), reverse=True)


def pointer(run: Path) -> int | Literal["release"] | None:
    """The iteration that the pointer names; None if there is no pointer, or it cannot be read."""
    try:
        text = (run / POINTER).read_text("ascii").strip()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if text == "release":
        return "release"
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def size(folder: Path) -> int:
    """Bytes of a checkpoint's files; 0 if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def point_to(run: Path, checkpoint: Checkpoint) -> None:
    """Writes the pointer atomically: a crash leaves the old one or the new one."""
    with atomic_write(run / POINTER) as stream:
        stream.write(_pointed(checkpoint).encode())


def choose(run: Path, step: int | None, check: Callable[[Path], list[str]]) -> Choice:
    """Finds the checkpoint to load: ``step``, else the pointer's, else the latest valid one.

    A pointer to a valid checkpoint is followed even if newer checkpoints exist: users roll a run back with it.

    Args:
        run: The run's folder, or one that a run loads from.
        step: The iteration that the user asks for (``--ckpt-step``).
        check: A checkpoint's folder to what is wrong with it (:func:`problems`); called for one after the other, until
            one is valid.

    Raises:
        ValueError: There are checkpoints, or a pointer to one, and none can be loaded; never random weights then.
    """
    found, said = checkpoints(run), pointer(run)
    if step is not None:
        return _asked(run, step, found, check)
    if not found:
        if (run / POINTER).exists():
            raise ValueError(
                f"{run} has a {POINTER} and no checkpoint: restore the checkpoint that it names, or remove the file to "
                "start from random weights."
            )
        return Choice(None)
    pointed = [c for c in found if _pointed(c) == str(said)]
    passed: list[str] = []
    for checkpoint in [*pointed, *(c for c in found if c not in pointed)]:
        wrong = check(checkpoint.folder)
        if not wrong:
            return Choice(checkpoint, _notes(run, found, checkpoint, said, passed))
        passed.append(f"{checkpoint.folder.name}: {_summary(wrong)}")
    raise ValueError(
        f"{run} has checkpoints, but no valid one; a run does not start from random weights next to them.\n  "
        + "\n  ".join(passed)
        + "\nRestore a valid one, or start with another folder; if it is an interrupted first save, remove it. "
        "If one was written elsewhere, has no manifest and is trusted: tools/verify_checkpoint.py --seal FOLDER, or "
        "--load-unverified where the folder cannot be written."
    )


def remove_old(run: Path, keep_last: int | None, keep_every: int | None, sealed: Path) -> list[Path]:
    """Removes checkpoints that retention does not keep; first those that an interrupted call has partly removed.

    Kept are ``sealed``, the last ``keep_last`` sealed ones up to it (itself among them), iterations that
    ``keep_every`` divides, and the pointer's. Newer ones (of before a roll back), releases, links and folders without
    a manifest are not touched.

    Args:
        run: The run's folder.
        keep_last: At least 1. None: all are kept.
        keep_every: None: only the last ones are kept.
        sealed: The checkpoint that was just written and hashed, and so is valid.

    Returns:
        The folders that are gone.

    Raises:
        ValueError: ``keep_last`` or ``keep_every`` below 1, or ``sealed`` is not a sealed checkpoint of the run.
    """
    sweep(run)
    for value, name in ((keep_last, "keep_last"), (keep_every, "keep_every")):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: keep at least 1, or give none to keep all.")
    known = [c for c in checkpoints(run) if is_sealed(c.folder) and not c.folder.is_symlink() and not c.release]
    new = next((c for c in known if c.folder.name == sealed.name), None)
    if new is None:
        raise ValueError(f"{sealed} is not a sealed checkpoint of {run}: nothing older is removed.")
    if keep_last is None:
        return []
    said, removed = pointer(run), []
    for checkpoint in [c for c in known if c.iteration <= new.iteration][keep_last:]:
        marked = keep_every is not None and checkpoint.iteration % keep_every == 0
        if marked or checkpoint.iteration == said:
            continue
        remove(checkpoint.folder)
        removed.append(checkpoint.folder)
    return removed


def sweep(run: Path) -> None:
    """Removes what an interrupted :func:`remove` has left."""
    for leftover in run.glob(f"{DELETING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a checkpoint's own folder under another name, so that a partly removed one is never loaded."""
    gone = folder.with_name(f"{DELETING}{folder.name}.{time.time_ns()}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _pointed(checkpoint: Checkpoint) -> str:
    """Content of the pointer to a checkpoint."""
    return "release" if checkpoint.release else str(checkpoint.iteration)


def _asked(run: Path, step: int, found: list[Checkpoint], check: Callable[[Path], list[str]]) -> Choice:
    """The checkpoint of --ckpt-step."""
    there = ", ".join(str(c.iteration) for c in found if not c.release) or "none"
    checkpoint = next((c for c in found if c.iteration == step and not c.release), None)
    if checkpoint is None:
        raise ValueError(f"--ckpt-step {step}: {run} has no iter_{step:07d}; its iterations are: {there}.")
    wrong = check(checkpoint.folder)
    if wrong:
        raise ValueError(
            f"--ckpt-step {step}: {checkpoint.folder} {_summary(wrong)}. Give another of {there}, or drop the flag: "
            "the latest valid one is loaded then."
        )
    return Choice(checkpoint)


def _notes(
    run: Path, found: list[Checkpoint], taken: Checkpoint, said: int | Literal["release"] | None, passed: list[str]
) -> list[str]:
    """Why this one, unless it is obvious."""
    notes = [f"skipped {text}" for text in passed]
    newer = found[: found.index(taken)]
    if _pointed(taken) == str(said):
        sealed = [c.folder.name for c in newer if is_sealed(c.folder)]
        if sealed:
            notes.append(
                f"{POINTER} says {said}: newer checkpoints exist ({', '.join(sealed)}) and are not loaded; "
                f"--ckpt-step loads one"
            )
        return notes
    if said is None:
        is_there = (run / POINTER).exists()
        notes.append(f"{POINTER} {'cannot be read' if is_there else 'is missing'}")
    elif _pointed(taken) != str(said) and not any(_pointed(c) == str(said) for c in found):
        notes.append(f"{POINTER} says {said}, which is not there")
    return [*notes, f"{taken.folder.name} is the latest valid checkpoint, and is loaded"]


def _summary(wrong: list[str]) -> str:
    """The first of what is wrong with a checkpoint, and how much more there is."""
    more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
    return "; ".join(wrong[:2]) + more
