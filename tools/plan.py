#!/usr/bin/env python3
"""What a run would cost, before anyone pays for it.

    python tools/plan.py --recipe paper-1b-intra
    python tools/plan.py --recipe paper-1b-intra --gpus 64 --gpu h100-80gb --pipeline-model-parallel-size 2

takes every flag of pretrain_hybrid.py beside its own and checks them as the run itself would.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid.cli import tool

if TYPE_CHECKING:
    from megatron_hybrid.plan.subject import Subject
    from megatron_hybrid.plan.time import Machine

MACHINE = (
    "--gpus-per-node",
    "--efficiency",
    "--peak-tflops",
    "--memory-gib",
    "--memory-bandwidth",
    "--nvlink-gbps",
    "--network-gbps",
)


def main() -> None:
    options, argv = parser().parse_known_args()
    from rich.console import Console

    from megatron_hybrid.plan import comparison, figures, fit, plots, subject, tables

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    plot: Callable[[figures.Figures, Path], None]
    if not options.gpu:
        needing = [flag for flag in MACHINE if getattr(options, flag[2:].replace("-", "_")) is not None]
        if needing:
            raise ValueError(f"{needing[0]} is of a GPU: name it with --gpu, such as --gpu h100-80gb.")
    if options.compare and options.fit:
        raise ValueError("--compare and --fit are two plans: ask for one at a time.")
    if options.match and not options.compare:
        raise ValueError("--match makes architectures comparable: give them with --compare, the reference first.")
    if options.compare:
        where = comparison.Where(options.gpus, options.device, not options.no_mamba_ssm)
        chosen = comparison.subjects(options.compare, argv, where)
        on = machine(options, chosen[0]) if options.gpu else None
        found = comparison.compare(chosen, options.match, options.convention, where, on)
        show, plot = tables.show_comparison, plots.plot_comparison
    elif options.fit:
        if options.gpus is None or not options.gpu:
            raise ValueError("--fit needs --gpus N and --gpu NAME, such as --gpus 64 --gpu h100-80gb.")
        planned = fit.unplaced(argv, options.device)
        found = fit.fit(argv, options.gpus, machine(options, planned), options.device, not options.no_mamba_ssm)
        show, plot = tables.show_fit, plots.plot_fit
    else:
        planned = subject.read(argv, options.gpus, options.device, not options.no_mamba_ssm)
        found = figures.figures(planned, machine(options, planned) if options.gpu else None)
        show, plot = tables.show, plots.plot
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console)
    if options.plot:
        plot(found, options.plot)
        print(f"plot written to {options.plot}", file=sys.stderr)


def machine(options: argparse.Namespace, planned: "Subject") -> "Machine":
    """The GPU of the options, with the peak of the planned run's precision.

    Raises:
        ValueError: A GPU that is not known, and whose figures are not all given.
    """
    from megatron_hybrid.costs.hardware import gpu
    from megatron_hybrid.plan.time import Machine

    precision = "bf16" if planned.args.bf16 else "fp16" if planned.args.fp16 else "fp32"
    units = {
        "peak": ("peak_tflops", 1e12),
        "memory": ("memory_gib", 2**30),
        "bandwidth": ("memory_bandwidth", 1e9),
        "nvlink": ("nvlink_gbps", 1e9 / 8),
        "network": ("network_gbps", 1e9 / 8),
        "efficiency": ("efficiency", 1),
        "gpus_per_node": ("gpus_per_node", 1),
    }
    given = {name: getattr(options, flag) for name, (flag, _) in units.items()}
    figures = {name: value * units[name][1] for name, value in given.items() if value is not None}
    try:
        known = gpu(options.gpu)
    except ValueError as error:
        needed = ["peak", "memory", "bandwidth", "nvlink"]
        missing = [f"--{units[name][0].replace('_', '-')}" for name in needed if name not in figures]
        if missing:
            raise ValueError(f"{error} A plan also needs {' '.join(missing)}.") from None
        return Machine(title=options.gpu, **figures)
    return Machine.of(known, precision, **figures)


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} ends in none of .png, .svg, .pdf")
    return path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print all figures as JSON")
    made.add_argument("--plot", type=picture, metavar="FILE", help="draw it: .png, .svg or .pdf")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the run would be")
    made.add_argument("--no-mamba-ssm", action="store_true", help="mamba_ssm is not installed there: torch's scan")
    gpus = made.add_argument_group("machine")
    gpus.add_argument("--gpus", type=int, help="number of GPUs; default the fewest that the layout fits")
    gpus.add_argument("--gpu", help="kind of GPU, such as h100-80gb: adds expected times")
    gpus.add_argument("--gpus-per-node", type=int, help="default 8")
    gpus.add_argument("--efficiency", type=float, help="of the dense peak that products reach; default 0.40")
    gpus.add_argument(
        "--peak-tflops", type=float, help="dense peak of a GPU in the run's precision, in place of the table's"
    )
    gpus.add_argument("--memory-gib", type=float, help="memory of a GPU, in place of the table's")
    gpus.add_argument("--memory-bandwidth", type=float, help="GB/s of a GPU's memory, in place of the table's")
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
        help="recipes, or layer patterns for the sizes of the other flags, side by side",
    )
    compare.add_argument(
        "--match",
        choices=["parameters", "flops"],
        help="make them comparable to the first: blocks of equal parameters (recipes made of blocks), or tokens of "
        "equal training FLOPs (any)",
    )
    compare.add_argument(
        "--convention", choices=["paper", "model"], default="paper", help="how --match flops counts FLOPs"
    )
    return made


if __name__ == "__main__":
    tool.run(main)
