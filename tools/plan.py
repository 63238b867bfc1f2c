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

    from megatron_hybrid.plan import comparison, figures, subject, tables

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if options.compare:
        chosen = comparison.subjects(options.compare, argv, options.gpus, options.device)
        found = comparison.compare(chosen, options.match, options.convention, options.gpus, options.device)
        show = tables.show_comparison
    elif options.match:
        raise ValueError("--match makes architectures comparable: give them with --compare, the reference first.")
    else:
        found, show = figures.figures(subject.read(argv, options.gpus, options.device)), tables.show
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--gpus", type=int, help="number of GPUs; default the fewest that the layout fits")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the run would be")
    compare = made.add_argument_group("comparison")
    compare.add_argument("--compare", nargs="+", metavar="NAME", help="recipes, or layer patterns, side by side")
    compare.add_argument(
        "--match",
        choices=["parameters", "flops"],
        help="make them comparable to the first: blocks of equal parameters, or tokens of equal training FLOPs",
    )
    compare.add_argument(
        "--convention", choices=["study", "model"], default="study", help="how --match flops counts FLOPs"
    )
    made.add_argument("--json", action="store_true", help="print all figures as JSON")
    return made


if __name__ == "__main__":
    cli.run(main)
