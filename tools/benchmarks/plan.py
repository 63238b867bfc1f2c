#!/usr/bin/env python3
"""Compare a plan with the run: memory, step time, and the efficiency that explains it.

    python tools/benchmarks/plan.py --recipe paper-100m-intra --global-batch-size 16 --train-iters 12
    python tools/benchmarks/plan.py --processes 2 --recipe paper-1b-intra --tensor-model-parallel-size 2 \\
        --sequence-parallel --global-batch-size 8 --train-iters 12

trains a few steps on mock data on this machine's GPUs, in the processes that a real run would have, and prints
planned and measured figures. The efficiency in the last line is the one to give tools/plan.py.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_hybrid.benchmarks.short_runs import environment, timed, train
from megatron_hybrid.cli import tool


def main() -> None:
    options, argv = parser().parse_known_args()
    import torch

    from megatron_hybrid.costs.hardware import gpu_of_device
    from megatron_hybrid.plan import figures, subject
    from megatron_hybrid.plan.time import Machine

    if not torch.cuda.is_available():
        raise ValueError("the comparison needs a CUDA device: torch finds none.")
    known = gpu_of_device(torch.cuda.get_device_name())
    if known is None:
        raise ValueError(
            f"{torch.cuda.get_device_name()} is not in the table of GPUs (megatron_hybrid/costs/hardware.py)."
        )
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment("cuda")}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['environment'].items())}")
    planned = subject.read(argv, options.processes, memory=known.capacity)
    print(f"backend {planned.args.backend}, scan {planned.args.ssm_kernels}")
    machine = Machine.of(known, "bf16" if planned.args.bf16 else "fp32")
    plan = figures.figures(planned, machine)
    records = train(argv, options.processes, "cuda")
    seconds = timed(records)
    memory = max(r["peak_memory_bytes"] for r in records if r.get("peak_memory_bytes"))
    step = statistics.median(seconds)
    report |= {
        "pattern": plan["pattern"],
        "layout": plan["layout"],
        "planned": {"memory": plan["memory"], "time": plan["time"]},
        "measured": {"peak_memory_bytes": memory, "seconds": seconds, "mfu": records[-1].get("mfu")},
    }
    print_comparison(report, max(row["total"] for row in plan["memory"]), memory, plan["time"]["step"], step)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def print_comparison(report: dict[str, Any], planned: float, memory: float, expected: float, step: float) -> None:
    time, measured = report["planned"]["time"], report["measured"]
    fullest = max(report["planned"]["memory"], key=lambda row: row["total"])
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in fullest.items() if name != "total")
    spread = f"median of {len(measured['seconds'])}, {min(measured['seconds']):.3f} to {max(measured['seconds']):.3f}"
    print(f"pattern  {report['pattern']}")
    print(f"memory   planned {planned / 2**30:.2f} GiB ({parts})")
    print(f"         measured peak {memory / 2**30:.2f} GiB, {memory / planned:.3f} of it")
    print(f"step     expected {expected:.3f} s, products at {time['efficiency']:.0%} of {time['gpu']}'s peak")
    print(f"         measured {step:.3f} s ({spread}), {step / expected:.3f} of it")
    print(f"MFU      expected {time['mfu']:.1%}, measured {time['mfu'] * expected / step:.1%}")


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    made.add_argument("--processes", type=int, default=1, help="GPUs of this machine")
    made.add_argument("--json", type=Path, help="write the report here too")
    return made


if __name__ == "__main__":
    tool.run(main)
