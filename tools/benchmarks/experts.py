"""Forward and backward time of one layer of experts, with our kernels and without them, and where the time goes.

    python tools/benchmarks/experts.py --micro-batch 4 --json out.json

Needs a GPU. Sizes are those of ``--recipe``; flags that are not this program's go to the model's command line and win
over the recipe. What each column is stands under the table.
"""

import argparse
import json
from pathlib import Path

import torch

from megatron_hybrid.benchmarks.single_layers import Bench, measure_peaks
from megatron_hybrid.benchmarks.timing import versions
from megatron_hybrid.cli import tool

LEGEND = """
One layer with its input norm and residual: forward, then gradients of input and weights; no optimizer, one process.
ms: median (and range) of the repeats, which go round the rows.
busy: milliseconds of kernels on the device, from a profile of three steps. waits: of the host for the device, a step.
floor: FLOPs of the layer's matrix products at the speed of a large square product, measured in this run.
share: floor / median.
""".strip()


def main() -> None:
    parser = tool.parser(__doc__)
    parser.add_argument("--recipe", default="paper-1b-inter-moe")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--repeats", type=int, help="default: as many as fit 2 s a row, 5 to 20")
    parser.add_argument("--kernels", type=int, default=16, help="rows of the table of kernels; default: 16")
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device, and there are no kernels of ours on a CPU.")
    report = measure(options, ["--backend", "torch", *rest])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace, rest: list[str]) -> dict:
    from megatron_hybrid.benchmarks import expert_ways

    settings = {"device": "cuda", "size": None, "dtype": "bf16", "deterministic": False, "length": [options.length]}
    batches = options.micro_batch
    given = argparse.Namespace(**{**vars(options), **settings, "micro_batch": batches[0]})
    bench = Bench(given, rest)
    peaks = measure_peaks(torch.bfloat16, True)
    report: dict = {"versions": versions(), "recipe": options.recipe, "peaks": peaks, "rows": []}
    speeds = f"product {peaks['flops_per_s'] / 1e12:.0f} TFLOP/s, copy {peaks['bytes_per_s'] / 1e12:.2f} TB/s"
    print(f"{options.recipe}, {speeds}")
    for batch in batches:
        given.micro_batch = batch
        rows, kernels = expert_ways.measure(bench, options.length, peaks)
        print(f"\n{batch} x {options.length} tokens{'':18}ms     range             busy   floor   share   waits")
        for row in rows:
            spread = f"{min(row['times_ms']):8.2f} ..{max(row['times_ms']):8.2f}"
            figures = f"{row['busy_ms']:8.2f}{row['bound_ms']:8.2f}{row['share_percent']:7.1f}%{row['waits']:8.1f}"
            print(f"{row['name']:34}{row['median_ms']:8.2f} {spread}{figures}")
            report["rows"].append({"micro_batch": batch, **row, "kernels_ms": kernels[row["name"]]})
        for name, found in kernels.items() if batch == batches[0] else ():
            print(f"\n{name}")
            for kernel, ms in found.most_common(options.kernels):
                print(f"{ms:9.3f} ms  {kernel[:100]}")
    print(f"\n{LEGEND}")
    bench.close()
    return report


if __name__ == "__main__":
    tool.run(main)
