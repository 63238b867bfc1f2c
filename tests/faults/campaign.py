"""Disturbs runs in many ways at random moments, and shows that each ends as if nothing had been.

    python -m tests.faults.campaign [--tries 5] [--kinds "kill -9 of rank 0" ...] [--seed 0] [--device cpu]

A try is a whole run of two processes under tools/launch.py that every kind of fault strikes once, in random order;
every second one saves in the background. A fault has failed if the run goes on from before its last whole checkpoint,
if anything takes longer than the bound, or if it is the last one in front of the first iteration whose loss, gradient
norm, learning rate or validation loss differs by a bit from a run that was not disturbed. Exit code 1 then.
As root each run has a file system of its own, which the full disk needs; else that kind is left out, and it says so.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.data.corpora import random_tokens
from tests.faults.kinds import KINDS
from tests.faults.run import BOUND_S, Ended, Hang, Run, Verdict, flags, results

FULL_DISK = "full disk in a save"
STEPS_OF_A_FAULT = 8
"""That a fault takes, the wait for its moment included; at times more, as a rule fewer."""


def main() -> None:
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # what the runs have started ends, too
    kinds = list(options.kinds)
    if os.geteuid() and FULL_DISK in kinds:
        kinds.remove(FULL_DISK)
        print(f"left out, since it needs root: {FULL_DISK}", flush=True)
    where = Path(tempfile.mkdtemp(prefix="faults-"))
    corpus = random_tokens(where / "corpus", documents=1000)
    words = flags(corpus, STEPS_OF_A_FAULT * (len(kinds) + 1), options.device)
    with run_in(where / "reference", words, "reference") as run:
        run.finish()
        reference = results(run.save)
    verdicts: list[Verdict] = []
    try:
        for number in range(options.tries):
            how = ["--async-save"] if number % 2 or options.background else []
            with run_in(where / f"try-{number}", [*words, *how], f"{options.seed} {number}") as run:
                disturb(run, kinds, reference)
            verdicts += run.verdicts
            if not any(v.failed for v in run.verdicts):
                shutil.rmtree(run.folder)
            print(f"try {number + 1}{' (background saves)' if how else ''} is done", flush=True)
    finally:  # what was found until somebody has ended it
        print(table(verdicts), flush=True)
    if options.json:
        options.json.write_text(json.dumps([verdict.__dict__ for verdict in verdicts], indent=1) + "\n")
    if any(verdict.failed for verdict in verdicts):
        sys.exit(f"see {where}")
    shutil.rmtree(where)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tries", type=int, default=5, metavar="N", help="of each kind (default: 5)")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    made.add_argument("--seed", type=int, default=0, help="of orders, moments and places (default: 0)")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one GPU for each process")
    made.add_argument("--background", action="store_true", help="save in the background in every try, not every second")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    return made


@contextlib.contextmanager
def run_in(folder: Path, words: list[str], seed: str) -> Iterator[Run]:
    """A run in a folder, on a file system of its own if that can be; its logs and metrics stay there."""
    run = Run(folder, words, random.Random(seed))
    own = not os.geteuid()
    if own:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", run.save], check=True)
    try:
        yield run
    finally:
        run.end_for_good()
        if own:
            shutil.copytree(run.save, folder / "kept", ignore=shutil.ignore_patterns("iter_*", "ballast"))
            subprocess.run(["umount", "--lazy", run.save], check=True)


def disturb(run: Run, kinds: list[str], reference: dict[int, tuple]) -> None:
    """Every kind once, in random order; the run's verdicts say what became of it."""
    try:
        run.start()
        for name in run.random.sample(kinds, len(kinds)):
            run.verdicts.append(Verdict(name))
            try:
                KINDS[name](run)
                run.recover()
            except (Hang, Ended) as error:
                run.verdicts[-1].hang = str(error)
            print(f"  {said(run.verdicts[-1])}", flush=True)
            if run.verdicts[-1].hang:
                return
        run.finish()
    except Hang as hang:
        run.verdicts[-1].hang = str(hang)
    compare(run, reference)


def compare(run: Run, reference: dict[int, tuple]) -> None:
    """Finds the first iteration that is not as it should be, and whose segment of the run it stands in."""
    found = results(run.save)
    bad = [i for i in sorted(set(reference) | set(found)) if found.get(i) != reference.get(i)]
    if not bad:
        return
    before = [v for v in run.verdicts if v.resumed is not None and v.resumed < bad[0]]
    culprit = before[-1] if before else run.verdicts[0]
    culprit.wrong += f"iteration {bad[0]}: {found.get(bad[0])} for {reference.get(bad[0])} ({len(bad)} differ)"
    print(f"  WRONG: {culprit.kind}: {culprit.wrong}", flush=True)


def said(verdict: Verdict) -> str:
    if verdict.hang:
        return f"{verdict.kind}: HANG: {verdict.hang}"
    went = f"went on from {verdict.resumed}, due {verdict.due}; {verdict.redone} steps again"
    return f"{verdict.kind}: {went}; {verdict.recovery_s:.0f} s" + (" LOST" if verdict.lost else "") + verdict.wrong


def table(verdicts: list[Verdict]) -> str:
    """A line for each kind, and all of them together."""
    head = ("kind", "tries", "failures", "lost steps", "wrong", "hangs", "steps again", "recovery s")
    rows: list[tuple] = []
    for name in dict.fromkeys(verdict.kind for verdict in verdicts):
        of = [v for v in verdicts if v.kind == name]
        counts = (sum(v.failed for v in of), sum(v.lost for v in of), sum(bool(v.wrong) for v in of))
        again, times = [v.redone for v in of], [v.recovery_s for v in of]
        spread = (
            f"{statistics.median(again):g} (max {max(again)})",
            f"{statistics.median(times):.0f} (max {max(times):.0f})",
        )
        rows.append((name, len(of), *counts, sum(bool(v.hang) for v in of), *spread))
    rows.sort(key=lambda row: list(KINDS).index(row[0]))
    rows.append((f"{len(rows)} kinds", *(sum(row[i] for row in rows) for i in range(1, 6)), "", ""))
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    return "\n".join([line.rstrip() for line in lines] + [f"bound of every wait: {BOUND_S:.0f} s"])


if __name__ == "__main__":
    began = time.monotonic()
    try:
        main()
    finally:
        print(f"{(time.monotonic() - began) / 60:.0f} minutes", flush=True)
