"""Checkpoints checked by hand: every file against the SHA-256 that was written when it was saved."""

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.run_folder import checkpoints


@dataclass(frozen=True)
class Finding:
    """One checkpoint."""

    folder: str
    bytes: int
    seconds: float
    problems: list[str]
    """None: it is valid."""


def to_check(folder: Path, every: bool) -> list[Path]:
    """The checkpoints that the user means.

    Raises:
        ValueError: There are none.
    """
    found = [checkpoint.folder for checkpoint in checkpoints.checkpoints(folder)]
    if found:
        pointed = checkpoints.pointer(folder)
        name = "release" if pointed == "release" else f"iter_{pointed or 0:07d}"
        named = [path for path in found if path.name == name]
        return found if every else named or found[:1]
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the --save folder of a run, or a checkpoint's own.")
    if not any((folder / name).exists() for name in (".metadata", "metadata.json", "integrity.json")):
        raise ValueError(
            f"{folder} has no checkpoints (iter_..., release), and is not a checkpoint of the format torch_dist."
        )
    return [folder]


def seal(given: Path, folders: list[Path]) -> None:
    """Writes the manifest of the one checkpoint that was given by its own folder.

    Raises:
        ValueError: It has one, or a run's folder was given.
    """
    if folders != [given]:
        raise ValueError(f"--seal trusts one checkpoint as it is: give its own folder, such as {folders[0]}.")
    if checkpoints.is_sealed(given):
        raise ValueError(
            f"--seal {given}: it has a manifest (integrity.json), and is checked against it without --seal."
        )
    checkpoints.seal(given)


def check(folder: Path) -> Finding:
    """Hashes a checkpoint."""
    start = time.monotonic()
    try:
        problems = checkpoints.problems(folder)
    except checkpoints.Unreachable as error:
        problems = [str(error)]
    return Finding(str(folder), checkpoints.size(folder), round(time.monotonic() - start, 3), problems)


def line(finding: Finding) -> str:
    """The line to print: folder, size, time, and whether it is valid."""
    found = "valid" if not finding.problems else "\n".join(["NOT VALID", *(f"    {p}" for p in finding.problems)])
    return f"{finding.folder}  {finding.bytes / 1e6:,.1f} MB  {finding.seconds:.1f} s  {found}"
