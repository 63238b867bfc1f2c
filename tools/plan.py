#!/usr/bin/env python3
"""What a run would cost, before anyone pays for it.

    python tools/plan.py --recipe paper-1b-intra
    python tools/plan.py --recipe paper-1b-intra --gpus 64 --gpu h100-80gb --pipeline-model-parallel-size 2

takes every flag of pretrain_hybrid.py beside its own and checks them as the run itself would.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid.data import cli


def main() -> None:
    options, argv = parser().parse_known_args()
    from rich.console import Console

    from megatron_hybrid.plan import figures, subject, tables

    found = figures.figures(subject.read(argv, options.gpus))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    tables.show(found, console)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--gpus", type=int, help="number of GPUs; default the fewest that the layout fits")
    made.add_argument("--json", action="store_true", help="print all figures as JSON")
    return made


if __name__ == "__main__":
    cli.run(main)
