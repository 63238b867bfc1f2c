"""Check by hand whether checkpoints are whole: every file against the SHA-256 that was written when it was saved.

    python tools/verify_checkpoint.py runs/mine                  the one that a run would load
    python tools/verify_checkpoint.py runs/mine --all            each one
    python tools/verify_checkpoint.py runs/mine/iter_0000030     that one
    python tools/verify_checkpoint.py --seal OTHER/iter_0000030  write a manifest for one that has none

Exit code 0: all that were checked are whole. 1: something is wrong. 2: a mistake in the command.

Hashes find what is torn or corrupt. They do not say who wrote it: weights may be anyone's, and pickles may name what
no checkpoint has, which a run refuses. Load, and seal, checkpoints from trusted folders only. This tool itself
unpickles nothing.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder import checkpoints


@dataclass(frozen=True)
class Finding:
    """One checkpoint."""

    folder: str
    bytes: int
    seconds: float
    problems: list[str]
    """None: it is whole."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="the --save folder of a run, or the folder of one checkpoint")
    parser.add_argument("--all", action="store_true", help="of a run: every checkpoint, newest first")
    parser.add_argument("--seal", action="store_true", help="write the manifest of a checkpoint that has none")
    parser.add_argument("--json", action="store_true", help="a JSON list in place of lines")
    args = parser.parse_args()
    folders = to_check(args.folder, args.all)
    if args.seal:
        seal(args.folder, folders)
    findings = []
    for folder in folders:
        findings.append(check(folder))
        if not args.json:
            print(line(findings[-1]), flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    sys.exit(1 if any(finding.problems for finding in findings) else 0)


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
        raise ValueError(f"{folder} has no checkpoints (iter_..., release), and is none of the format torch_dist.")
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
    """What the user reads: folder, size, time, and whether it is whole."""
    found = "whole" if not finding.problems else "\n".join(["NOT WHOLE", *(f"    {p}" for p in finding.problems)])
    return f"{finding.folder}  {finding.bytes / 1e6:,.1f} MB  {finding.seconds:.1f} s  {found}"


if __name__ == "__main__":
    tool.run(main)
