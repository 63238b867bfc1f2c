"""Compare kernels of attention on the shapes of the layers *, P and W at 1B, whole samples and packed documents.

    python tools/benchmarks/attention.py [--json out.json] [--shapes W "W packed"] [--lengths 8192x4 32768x1]
    python tools/benchmarks/attention.py --search W --lengths 32768x1

On CUDA, in bf16. Each kernel is first compared with the formula in float64, output and gradients, at 1,024 tokens; one
that is wrong, or refuses a shape, gets no time. TFLOP/s count visible pairs of queries and keys; see
megatron_hybrid/benchmarks/attention_arms.py. A star marks the kernel that the layers take. FlashAttention-4 is measured
where ``flash_attn.cute`` is installed. ``--search`` times other lines of the Triton kernels' table of configurations
(kernels/triton/configs.py) and prints the fastest as the table has it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from megatron_hybrid.benchmarks.attention_arms import Shape, arms, measure, shapes
from megatron_hybrid.benchmarks.timing import versions

NAMES = [shape.name for shape in shapes(1, 1)]


def sizes(text: str) -> tuple[int, int]:
    """``8192x4`` to (4, 8192)."""
    length, batch = text.split("x")
    return int(batch), int(length)


def compare(shape: Shape, without: list[str]) -> list[dict]:
    rows, short = [], arms(shape.with_length(2, 1024))
    for name, arm in arms(shape).items():
        if name.rstrip("*") in without:
            continue
        row = measure(shape, name, arm, short[name])
        rows.append(row)
        start = f"{shape.name:9} {shape.length:6}x{shape.batch} {name:16}"
        if "refused" in row:
            print(f"{start} not run: {row['refused'][:80]}", flush=True)
            continue
        parts = [
            f"{row[f'{what}_ms']:8.3f} ms {row[f'{what}_tflops']:5.0f} TFLOP/s {100 * row[f'{what}_roofline']:4.0f}%"
            for what in ("forward", "both")
        ]
        print(f"{start} {parts[0]}  | {parts[1]}   {row['error']:.0e}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--lengths", nargs="+", type=sizes, default=[(4, 8192), (1, 32768)], metavar="TOKENSxSAMPLES")
    parser.add_argument("--without", nargs="+", default=[], metavar="ARM", help="such as flex, which must be compiled")
    parser.add_argument("--search", nargs="+", choices=NAMES, default=[], help="look for faster configurations")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    command, found = shlex.join(["python", *sys.argv]), versions()
    print(command)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    rows: list[dict] = []
    if args.search:
        from megatron_hybrid.benchmarks.attention_search import search

        for batch, length in args.lengths:
            for shape in shapes(batch, length):
                if shape.name in args.search:
                    rows += search(shape)
    else:
        print("shape     tokens    kernel           forward: time, rate, roofline      | and backward        error")
        for batch, length in args.lengths:
            for shape in shapes(batch, length):
                if shape.name in args.shapes:
                    rows += compare(shape, args.without)
    if args.json:
        args.json.write_text(json.dumps({"command": command, "versions": found, "rows": rows}) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
