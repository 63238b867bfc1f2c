#!/usr/bin/env python3
"""Estimate the cost of a run: parameters, FLOPs, memory, communication, time.

    python tools/plan.py --recipe paper-1b-intra
    python tools/plan.py --recipe paper-1b-intra --gpus 64 --gpu h100-80gb --pipeline-model-parallel-size 2

takes every flag of pretrain_hybrid.py besides its own and checks them as a run does.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_hybrid.cli import tool


def main() -> None:
    options, argv = parser().parse_known_args()
    from rich.console import Console

    from megatron_hybrid.plan import plots, request, tables

    kind, found = request.plan(options, argv)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        tables.SHOW[kind](found, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if options.plot:
        plots.PLOT[kind](found, options.plot)
        print(f"plot written to {options.plot}", file=sys.stderr)


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .svg or .pdf")
    return path


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    made.add_argument("--json", action="store_true", help="print all figures as JSON")
    made.add_argument("--plot", type=picture, metavar="FILE", help="plot the results: .png, .svg or .pdf")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="hardware of the run")
    gpus = made.add_argument_group("machine")
    gpus.add_argument("--gpus", type=int, help="number of GPUs; default the fewest that the layout fits")
    gpus.add_argument("--gpu", help="kind of GPU, such as h100-80gb: adds expected times")
    gpus.add_argument("--gpus-per-node", type=int, help="default 8")
    gpus.add_argument(
        "--efficiency", type=float, help="share of the dense peak that matrix products reach; default 0.40"
    )
    gpus.add_argument(
        "--peak-tflops", type=float, help="dense peak of a GPU in the run's precision, instead of the table's"
    )
    gpus.add_argument("--memory-gib", type=float, help="memory of a GPU, instead of the table's")
    gpus.add_argument("--memory-bandwidth", type=float, help="GB/s of a GPU's memory, instead of the table's")
    gpus.add_argument("--nvlink-gbps", type=float, help="Gbit/s of a GPU inside a node, one direction")
    gpus.add_argument("--network-gbps", type=float, help="Gbit/s of a GPU between nodes; default 400")
    made.add_argument_group("layouts").add_argument(
        "--fit", action="store_true", help="propose layouts for --gpus N --gpu NAME, fastest first, with their flags"
    )
    compare = made.add_argument_group("comparison")
    compare.add_argument(
        "--compare",
        nargs="+",
        metavar="NAME",
        help="recipes, or layer patterns with the sizes of the other flags, to compare",
    )
    compare.add_argument(
        "--match",
        choices=["parameters", "flops"],
        help="make them comparable to the first: blocks of equal parameters (recipes made of blocks), or tokens of "
        "equal training FLOPs (any)",
    )
    compare.add_argument(
        "--convention",
        type=lambda name: {"study": "paper"}.get(name, name),  # its earlier name
        choices=["paper", "model"],
        default="paper",
        help="how --match flops counts FLOPs",
    )
    return made


if __name__ == "__main__":
    tool.run(main)
