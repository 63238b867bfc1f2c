"""Disturbs runs in many ways at random moments, and shows that each ends as if nothing had been.

    python -m tests.faults.campaign [--tries 5] [--kinds "kill -9 of rank 0" ...] [--seed 0]

Each try is a whole run of two CPU processes under tools/launch.py. It fails if the run goes on from before its last
whole checkpoint, if any loss, gradient norm, learning rate or validation loss differs by a bit from those of a run that
was not disturbed, or if anything takes longer than the bound. Exit code 1 then.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.kinds import KINDS
from tests.faults.trial import BOUND_S, Hang, Trial, Verdict, results, write_corpus


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tries", type=int, default=5, metavar="N", help="of each kind (default: 5)")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    made.add_argument("--jobs", type=int, default=2, metavar="N", help="tries at a time (default: 2)")
    made.add_argument("--seed", type=int, default=0, help="of the moments and places (default: 0)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the verdict of each try there")
    options = made.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # what the tries have started ends, too
    where = Path(tempfile.mkdtemp(prefix="faults-"))
    corpus = write_corpus(where / "corpus")
    reference = undisturbed(where / "reference", corpus)
    verdicts: dict[str, list[Verdict]] = {name: [] for name in options.kinds}

    def attempt(name: str, number: int) -> None:
        began = time.monotonic()
        folder = where / f"{name.replace(' ', '-')}-{number}"
        verdicts[name].append(one(name, folder, corpus, f"{options.seed} {number}", reference))
        words = said(verdicts[name][-1])
        print(f"{name}, try {number + 1}: {words} ({time.monotonic() - began:.0f} s)", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        tries = [(name, number) for number in range(options.tries) for name in options.kinds]
        list(pool.map(lambda one_try: attempt(*one_try), tries))
    print(table(verdicts))
    if options.json:
        options.json.write_text(
            json.dumps({n: [v.__dict__ for v in vs] for n, vs in verdicts.items()}, indent=1) + "\n"
        )
    failed = any(verdict.failed for found in verdicts.values() for verdict in found)
    if not failed:
        shutil.rmtree(where)
    sys.exit(f"see {where}" if failed else 0)


def undisturbed(folder: Path, corpus: Path) -> dict[int, tuple]:
    """What the run computes when nobody disturbs it."""
    trial = Trial(folder, corpus, "reference")
    try:
        trial.start()
        trial.finish()
        return results(trial.run)
    finally:
        trial.end_for_good()


def one(name: str, folder: Path, corpus: Path, seed: str, reference: dict[int, tuple]) -> Verdict:
    """One try of a kind. Its files stay if it fails."""
    trial = Trial(folder, corpus, f"{name} {seed}")
    try:
        KINDS[name](trial)
        if name != "full disk in a save":  # which has to finish while its file system is there
            trial.finish()
        trial.judge(reference)
    except Hang as hang:
        trial.verdict.hang = str(hang)
    finally:
        trial.end_for_good()
    if not trial.verdict.failed:
        shutil.rmtree(folder)
    return trial.verdict


def said(verdict: Verdict) -> str:
    if verdict.hang:
        return f"HANG: {verdict.hang}"
    went = f"went on from {', '.join(map(str, verdict.resumed))}; due {verdict.due}; {verdict.redone} steps done again"
    return went + (" LOST STEPS" if verdict.lost else "") + "".join(f" WRONG: {text}" for text in verdict.wrong[:2])


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """A line for each kind, and all of them together."""
    head = ("kind", "tries", "failures", "lost", "wrong", "hangs", "steps again", "recovery s")
    rows = []
    for name, found in verdicts.items():
        counts = [
            sum(map(bool, column)) for column in zip(*[(v.failed, v.lost, v.wrong, v.hang) for v in found], strict=True)
        ]
        again = f"{statistics.median(v.redone for v in found):g} (max {max(v.redone for v in found)})"
        times = f"{statistics.median(v.recovery_s for v in found):.0f} (max {max(v.recovery_s for v in found):.0f})"
        rows.append((name, len(found), *counts, again, times))
    total = [sum(row[i] for row in rows) for i in range(1, 6)]
    rows.append((f"{len(verdicts)} kinds", *total, "", ""))
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    return "\n".join([*lines, f"bound of every wait: {BOUND_S:.0f} s"])


if __name__ == "__main__":
    main()
