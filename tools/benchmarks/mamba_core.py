#!/usr/bin/env python3
"""Time the core of a Mamba-2 layer by each of its kernels: convolution, scan and gate, forward and backward.

    python tools/benchmarks/mamba_core.py --json out.json
    python tools/benchmarks/mamba_core.py --search scan_forward scan_output

From the projection [s, b, W] to y [s, b, h p], as a layer uses it: mamba_ssm takes [b, s, ...], and the copies on its
way in and out count; `batch first` is without them. Each is first compared with torch's operations in fp32, output and
all gradients; one that is wrong gets no time. Rounds are interleaved; ratios are medians of ratios within one round.
--search looks for faster lines of the table in kernels/triton/configs.py and prints them.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.cli import tool

TOLERANCE = {"bfloat16": 4e-2, "float32": 1e-4}
"""Of the largest entry: bf16 rounds what stands between two products; fp32 sums in another order."""


def main() -> int:
    options = parser().parse_args()
    import torch

    from megatron_hybrid.benchmarks.mamba_cores import Sizes
    from megatron_hybrid.benchmarks.timing import versions

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device. Use --device cpu.")
    model = {name: getattr(options, name) for name in ("heads", "head_dim", "state", "groups")}
    cases = [Sizes(length, batch, **model) for length, batch in options.cases]
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(("causal_conv1d",))}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['versions'].items() if v)}", flush=True)
    dtype = getattr(torch, options.dtype)
    if options.search is not None:
        return search(options, cases[0], dtype)
    keep_tuning(options.tuning, read=True)
    report["cases"] = [measure(case, options, dtype) for case in cases]
    keep_tuning(options.tuning, read=False)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["correct"] for case in report["cases"] for row in case["rows"]) else 1


def measure(sizes: Any, options: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """Errors, times and memory of each implementation at one size, printed as they come."""
    import torch

    from megatron_hybrid.benchmarks import mamba_cores
    from megatron_hybrid.benchmarks.timing import peak_memory

    device = torch.device(options.device)
    wrong = mamba_cores.errors(sizes, device, dtype)
    rows, runs = [], {}
    for core in mamba_cores.cores(sizes, device, dtype):
        row: dict[str, Any] = {"name": core.name, "error": wrong[core.name]}
        row["correct"] = row["error"] <= TOLERANCE[options.dtype]
        rows.append(row)
        if row["correct"]:
            core.both()
            row["peak_mib"] = peak_memory(core.both, device) / 2**20
            runs[core.name] = (core.forward, core.both)
    flat = [run for pair in runs.values() for run in pair]
    times = iter(rounds(flat, options.repeats, device))
    for row in rows:
        if row["name"] in runs:
            row["forward_ms"], row["times_ms"] = next(times), next(times)
    compare(rows, mamba_cores.RIVAL)
    print_table(rows, sizes, options)
    return {"sizes": sizes.__dict__, "columns": sizes.columns, "least_bytes": sizes.least_bytes, "rows": rows}


def rounds(runs: list[Callable], repeats: int, device: Any) -> list[list[float]]:
    """Milliseconds of each run in each round, after a round of warm-up."""
    if device.type == "cuda":
        from megatron_hybrid.benchmarks.single_layers import times_ms

        return times_ms(runs, repeats)
    from megatron_hybrid.benchmarks.timing import seconds_of

    found = [[1e3 * seconds_of(run, device) for run in runs] for _ in range(repeats + 1)]
    return [list(times) for times in zip(*found[1:], strict=True)]


def compare(rows: list[dict[str, Any]], rival: str) -> None:
    """Adds medians and the ratios to the rival, where it has run."""
    theirs = next((row["times_ms"] for row in rows if row["name"] == rival and "times_ms" in row), None)
    for row in [row for row in rows if "times_ms" in row]:
        row["median_ms"] = statistics.median(row["times_ms"])
        if theirs:
            row["ratio"] = statistics.median(a / b for a, b in zip(row["times_ms"], theirs, strict=True))


def print_table(rows: list[dict[str, Any]], sizes: Any, options: argparse.Namespace) -> None:
    print(
        f"\n{sizes.length} tokens x {sizes.batch}, {sizes.heads} heads of {sizes.head_dim}, state {sizes.state}, "
        f"{sizes.groups} group(s), {options.dtype} on {options.device}; least traffic {sizes.least_bytes / 1e9:.2f} GB"
    )
    print(f"{'':24}forward ms   both ms     min ..    max    ratio  peak MiB    error")
    for row in rows:
        if not row["correct"]:
            print(f"{row['name']:24}WRONG: no time is reported, error {row['error']:.1e}")
            continue
        ratio = f"{row['ratio']:8.3f}" if "ratio" in row else "       -"
        print(
            f"{row['name']:24}{statistics.median(row['forward_ms']):10.3f}{row['median_ms']:10.3f}"
            f"{min(row['times_ms']):8.3f} ..{min(max(row['times_ms']), 1e5):8.3f} {ratio}{row['peak_mib']:10.1f}  "
            f"{row['error']:.1e}",
            flush=True,
        )


def search(options: argparse.Namespace, sizes: Any, dtype: Any) -> int:
    """Prints faster lines of the table."""
    if options.device != "cuda":
        raise ValueError("--search needs a CUDA device.")
    from megatron_hybrid.benchmarks import config_search
    from megatron_hybrid.kernels.triton.configs import TABLE

    shape = str(dtype.itemsize)
    known = [key for key in TABLE if key[1] == shape and key[0].startswith(("scan", "causal_conv"))]
    keys = [key for key in known if not options.search or key[0] in options.search]
    missing = set(options.search) - {name for name, _ in keys}
    if missing:
        raise ValueError(f"--search {' '.join(sorted(missing))}: the table has {', '.join(name for name, _ in known)}.")
    with tempfile.TemporaryDirectory() as folder:
        say = lambda text: print(text, flush=True)  # noqa: E731
        found = config_search.search(sizes, keys, dtype, options.workers, Path(folder), say)
    print("\nlines of the table:")
    for key, line in found.items():
        print(config_search.shown(key, line))
    return 0


def keep_tuning(file: Path | None, read: bool) -> None:
    """Configurations that mamba_ssm's kernels have chosen, from an earlier command or for the next."""
    if file is None:
        return
    from megatron_hybrid.benchmarks import rival_tuning

    if not read:
        rival_tuning.save(file)
    elif file.exists():
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401

        print(f"{rival_tuning.load(file)} configurations of mamba_ssm's kernels are those of {file}")


def case(text: str) -> tuple[int, int]:
    try:
        length, batch = (int(word) for word in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give tokens x samples, such as 8192x4") from None
    if length < 1 or batch < 1:
        raise argparse.ArgumentTypeError(f"{text}: tokens and samples must be at least 1")
    return length, batch


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    default = [(8192, 4), (32768, 1)]
    made.add_argument("--cases", nargs="+", type=case, default=default, metavar="SxB", help="default 8192x4 32768x1")
    for flag, value in (("heads", 32), ("head-dim", 128), ("state", 128), ("groups", 1), ("repeats", 15)):
        made.add_argument(f"--{flag}", type=int, default=value, help=f"default {value}")
    made.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    made.add_argument("--search", nargs="*", metavar="KERNEL", help="search lines of these kernels, or of all")
    made.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile; default one a core")
    made.add_argument("--tuning", type=Path, help="file that keeps what mamba_ssm's kernels have chosen by trial")
    made.add_argument("--json", type=Path, help="write the results here too")
    return made


if __name__ == "__main__":
    tool.run(lambda: sys.exit(main()))
