"""From the options of ``tools/plan.py`` to the figures that they ask for."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Literal

from megatron_hybrid.argv import flag_name
from megatron_hybrid.costs.hardware import gpu
from megatron_hybrid.plan import comparison, fit, subject
from megatron_hybrid.plan.figures import Figures, figures
from megatron_hybrid.plan.subject import Subject
from megatron_hybrid.plan.time import Machine

Kind = Literal["run", "comparison", "fit"]
UNITS = {
    "gpus_per_node": ("gpus_per_node", 1),
    "efficiency": ("efficiency", 1),
    "peak": ("peak_tflops", 1e12),
    "memory": ("memory_gib", 2**30),
    "bandwidth": ("memory_bandwidth", 1e9),
    "nvlink": ("nvlink_gbps", 1e9 / 8),
    "network": ("network_gbps", 1e9 / 8),
}
"""Figures of a GPU to the options that give them, and the units of these."""


def plan(options: Namespace, argv: Sequence[str]) -> tuple[Kind, Figures]:
    """The figures that are asked for, and which tables and plots show them.

    Args:
        options: Those of ``tools/plan.py``.
        argv: Flags of the run.

    Raises:
        ValueError: Options that do not go together, or flags that the run would be refused for.
    """
    if not options.gpu:
        needing = [option for option, _ in UNITS.values() if getattr(options, option) is not None]
        if needing:
            raise ValueError(f"{flag_name(needing[0])} is of a GPU: name it with --gpu, such as --gpu h100-80gb.")
    if options.compare and options.fit:
        raise ValueError("--compare and --fit are two plans: ask for one at a time.")
    if options.match and not options.compare:
        raise ValueError("--match makes architectures comparable: give them with --compare, the reference first.")
    if options.compare:
        where = comparison.Where(options.gpus, options.device, memory(options))
        chosen = comparison.subjects(options.compare, argv, where)
        on = machine(options, chosen[0]) if options.gpu else None
        return "comparison", comparison.compare(chosen, options.match, options.convention, where, on)
    if options.fit:
        if options.gpus is None or not options.gpu:
            raise ValueError("--fit needs --gpus N and --gpu NAME, such as --gpus 64 --gpu h100-80gb.")
        on = machine(options, fit.unplaced(argv, options.device))
        return "fit", fit.fit(argv, options.gpus, on, options.device)
    planned = subject.read(argv, options.gpus, options.device, memory(options))
    return "run", figures(planned, machine(options, planned) if options.gpu else None)


def memory(options: Namespace) -> float | None:
    """Bytes of a GPU, as far as the options say; what is missing for a machine is :func:`machine`'s to refuse."""
    if options.memory_gib is not None:
        return options.memory_gib * 2**30
    try:
        return gpu(options.gpu).capacity if options.gpu else None
    except ValueError:
        return None


def machine(options: Namespace, planned: Subject) -> Machine:
    """The GPU of the options, with the peak of the planned run's precision.

    Raises:
        ValueError: A GPU that is not known, and whose figures are not all given.
    """
    precision = "bf16" if planned.args.bf16 else "fp16" if planned.args.fp16 else "fp32"
    given = {name: getattr(options, option) for name, (option, _) in UNITS.items()}
    own = {name: value * UNITS[name][1] for name, value in given.items() if value is not None}
    try:
        known = gpu(options.gpu)
    except ValueError as error:
        needed = ["peak", "memory", "bandwidth", "nvlink"]
        missing = [flag_name(UNITS[name][0]) for name in needed if name not in own]
        if missing:
            raise ValueError(f"{error} A plan also needs {' '.join(missing)}.") from None
        return Machine(title=options.gpu, **own)
    return Machine.of(known, precision, **own)
