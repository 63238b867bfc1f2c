"""Time and bytes a second of the causal convolution, forward and backward, on CUDA.

    python tools/benchmarks/convolution.py [--json out.json]
    python tools/benchmarks/convolution.py --search [--documents]

x is columns of a projection [tokens, samples, width], as a Mamba layer has it, in bf16. Rows: the Triton kernels with
their line of the table of configurations; causal-conv1d's kernels if it is installed, on x where it lies and with the
copy that a layout of samples first costs; a copy of x, as the speed that memory has. GB/s counts what must move: x and
y forward, x, dy and dx backward. ``--search`` times other lines of the table and prints the fastest as the table
has it.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.benchmarks.timing import median_us, versions

SHAPES = {"M 1B": (4, 8192, 4096, 4352, 32), "P 1B": (4, 8192, 2304, 2560, 18), "M 1B, 32K": (1, 32768, 4096, 4352, 32)}
"""Samples, tokens; columns before x, of x (x, B and C), and after it."""
SHOWN = 8
"""Lines of a search."""


def inputs(shape: tuple[int, ...], packed: bool) -> dict[str, Any]:
    """x, y, dy and dx of one layer, and its weights; y and dy lie as [b, s, c], x and dx in their projections."""
    b, s, before, c, after = shape

    def make(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    def columns() -> torch.Tensor:
        return make(s, b, before + c + after)[:, :, before : before + c].transpose(0, 1)  # [b, s, c]

    starts = torch.rand(b, s, device="cuda") < 1 / 1000
    documents = starts.cumsum(1).int() if packed else None
    weights = {"weight": make(c, 4), "bias": make(c)}
    return {"x": columns(), "dx": columns(), "y": make(b, s, c), "dy": make(b, s, c), "documents": documents, **weights}


def ours(t: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    from megatron_hybrid.kernels.triton.causal_conv import causal_conv_backward, causal_conv_forward

    common = (t["weight"], t["bias"], t["documents"], None, True)
    return {
        "forward": lambda: causal_conv_forward(t["x"], *common, t["y"]),
        "backward": lambda: causal_conv_backward(t["dy"], t["x"], *common, t["dx"]),
    }


def rivals(t: dict[str, Any]) -> dict[str, dict[str, Callable[[], Any]]]:
    """causal-conv1d through autograd's functions; a copy of x."""
    found: dict[str, dict[str, Callable]] = {"copy of x": {"forward": lambda: t["y"].copy_(t["x"])}}
    if not find_spec("causal_conv1d"):
        print("causal-conv1d is not installed: its rows are left out (requirements-gpu.txt)")
        return found
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function

    documents = t["documents"]

    def forward(x: torch.Tensor) -> Any:
        return causal_conv1d_fwd_function(x.transpose(1, 2), t["weight"], t["bias"], documents, None, None, True)

    def backward(x: torch.Tensor) -> Any:
        dy, rest = t["dy"].transpose(1, 2), (documents, None, None, None, False, True)
        return causal_conv1d_bwd_function(x.transpose(1, 2), t["weight"], t["bias"], dy, *rest)

    copied = t["x"].contiguous()
    found["causal-conv1d"] = {"forward": lambda: forward(copied), "backward": lambda: backward(copied)}
    found["causal-conv1d, copied"] = {
        "forward": lambda: forward(t["x"].contiguous()),
        "backward": lambda: t["dx"].copy_(backward(copied)[0].transpose(1, 2)),
    }
    return found


def gigabytes_a_second(t: dict[str, Any], way: str, microseconds: float) -> float:
    moved = {"forward": 2, "backward": 3}[way] * t["x"].numel() * t["x"].element_size()
    return moved / microseconds / 1e3


def compare(shape: tuple[int, ...], packed: bool) -> Iterator[dict[str, Any]]:
    t = inputs(shape, packed)
    for name, ways in {"Triton": ours(t), **rivals(t)}.items():
        for way, run in ways.items():
            took = median_us(run)
            yield {"name": name, "way": way, "us": took, "gb_s": gigabytes_a_second(t, way, took)}


def lines(way: str) -> Iterator[dict[str, int]]:
    """Lines of the table worth a try."""
    tokens = (32, 64, 128) if way == "forward" else (64, 128, 256)
    for (channels, warps), length, stages in itertools.product(
        [(64, 1), (128, 1), (256, 1), (256, 2), (512, 2), (512, 4)], tokens, (1, 2, 3)
    ):
        if channels <= 256 * warps:
            line = {"CHANNELS": channels, "TOKENS": length, "STAGES": stages, "num_warps": warps}
            yield line
            if way == "backward":
                yield line | {"maxnreg": 128}


def search(shape: tuple[int, ...], packed: bool) -> Iterator[dict[str, Any]]:
    from megatron_hybrid.kernels.triton import configs
    from megatron_hybrid.kernels.triton.causal_conv import shape_class

    t = inputs(shape, packed)
    table: Any = configs.TABLE
    for way, run in ours(t).items():
        key = f"causal_conv_{way}", shape_class(t["x"], t["documents"])
        kept = table[key]
        timed: list[dict[str, Any]] = []
        for line in lines(way):
            table[key] = line
            took = median_us(run)
            timed.append({"way": way, "line": line, "us": took, "gb_s": gigabytes_a_second(t, way, took)})
        table[key] = kept
        timed.sort(key=lambda row: row["us"])
        print(f"    {key}: {timed[0]['line']},".replace("'", '"'))
        yield from timed[:SHOWN]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="look for the fastest line of the table")
    parser.add_argument("--documents", action="store_true", help="packed documents of 1000 tokens on average")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels need a CUDA device, and torch sees none")
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), "rows": []}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['versions'].items())}")
    for name in options.shapes:
        print(f"\n{name}: samples, tokens, columns before, of and after x: {SHAPES[name]}")
        found = (search if options.search else compare)(SHAPES[name], options.documents)
        for row in found:
            report["rows"].append({"shape": name, **row})
            what = row.get("line") or row["name"]
            print(f"{row['way']:9} {row['us']:8.1f} us {row['gb_s']:7.0f} GB/s  {what}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
