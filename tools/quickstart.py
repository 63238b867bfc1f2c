"""Train a small hybrid on real text, from nothing, on the CPU: corpus, tokenizer, data, training.

    make quickstart        (or, with the requirements installed: python tools/quickstart.py)

Finished steps are skipped; an interrupted training resumes from its last checkpoint.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.cli.quickstart import Quickstart, StepFailed

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("runs/quickstart"),
        help="where all files go (default: runs/quickstart)",
    )
    parser.add_argument("--train-iters", type=int, help="iterations (default: those of the demo recipe)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    began = time.perf_counter()
    try:
        Quickstart(args.directory, args.train_iters, ROOT).run()
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"quickstart: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    tool.run(main)
