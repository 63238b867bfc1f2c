"""Forward and backward time, peak memory and tokens/s of single layers, and of P against two separate mixers.

    python tools/benchmarks/layers.py --length 8192,32768 --json out.json --plot out.png
    python tools/benchmarks/layers.py --recipe paper-350m-intra --presets hymba --layers P --backend torch

On CUDA at the sizes of ``--recipe``, else on the CPU engine at small ones. Flags that are not this program's go to
the model's command line and win over the recipe. A layer that is refused or fails prints its error and the exit code
is 1. What each row and column is stands under the tables.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid import pictures
from megatron_hybrid.benchmarks.single_layers import BUDGET_MS, FEWEST, MOST, WARM_UP, Bench, Case, measure_peaks
from megatron_hybrid.cli import tool
from megatron_hybrid.layers.intra.design import PRESETS, IntraDesign

LEGEND = """
One layer with its input norm and residual: forward, then gradients of input and weights; no optimizer, one process.
ms: median (and range) of the repeats, which go round the rows of one block so that a busy machine slows all alike.
peak MiB: the worst moment beyond weights, input and output gradient: activations and gradients of the weights.
bound ms: the larger of FLOPs (costs/flops.py, forward x 3) at the speed of a large square product, and least
  memory traffic (benchmarks/single_layers.py, `traffic`) at the speed of a large copy, both measured in this run.
roofline: bound / median. The scan counts as the chunked products that its mask leaves.
attention alone: P's attention branch (its heads, narrow Q and K, wide V) between an input and an output projection of
  its own; upstream's attention cannot have values wider than queries. No norm of its output.
mamba alone: the stock M layer with P's ssm width and head size, gated norm included.
one after the other: the two as two layers. Values that a preset shares are projected by each attention layer.
Two alike branches: the one mixer alone is measured once and counts twice in the sum.
ratio: median (and range) of the ratios within one round, and that of the fastest times, which a busy machine disturbs
  least; below 1, P is faster.
""".strip()


def intra_cases(preset: str, d: IntraDesign) -> list[Case]:
    """P, each of its mixers alone, and both as two layers."""
    chosen = ["--intra-preset", preset]
    mamba = f"--mamba-num-heads {d.ssm_heads} --mamba-head-dim {d.ssm_head_dim} --intra-ssm-head-dim {d.ssm_head_dim}"
    separate = [*chosen, *mamba.split()]
    symbols = {"attention": "P", "mamba": "M"}
    return [
        Case("P", "P", chosen, preset),
        *(Case(f"{kind} alone", symbols[kind], separate, preset, "P") for kind in dict.fromkeys(d.branches)),
        Case("one after the other", "".join(symbols[kind] for kind in d.branches), separate, preset, "P"),
    ]


def ratios_of(rows: list[dict[str, Any]], d: IntraDesign) -> list[dict[str, Any]]:
    """P against its separate mixers, round by round; nothing where a row that is needed has no times."""
    times = {row["name"]: row["times_ms"] for row in rows if "times_ms" in row}
    alone = [times.get(f"{kind} alone", []) for kind in d.branches]
    rivals = {
        "sum of both alone": [a + b for a, b in zip(*alone, strict=False)],
        "one after the other": times.get("one after the other", []),
    }
    found = []
    for name in (name for name in times if name == "P"):
        for rival, theirs in rivals.items():
            each = [ours / other for ours, other in zip(times[name], theirs, strict=False)]
            if each:
                where = {"length": rows[0]["length"], "preset": rows[0]["preset"], "of": name, "to": rival}
                spread = {"ratio": statistics.median(each), "low": min(each), "high": max(each)}
                found.append({**where, **spread, "fastest": min(times[name]) / min(theirs)})
    return found


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = f"{row['preset']:17}{row['name']:20}"
        if "error" in row:
            print(f"{name} FAILED: {' '.join(row['error'].split())[:300]}", flush=True)
            continue
        print(
            f"{name}{row['median_ms']:10.2f} {min(row['times_ms']):9.2f} ..{max(row['times_ms']):9.2f}"
            f"{row['tokens_per_s']:11.0f}{row['peak_mib']:10.1f}{row['bound_ms']:10.3f}{row['roofline_percent']:8.1f}%",
            flush=True,
        )


def print_ratios(ratios: list[dict[str, Any]]) -> None:
    print(f"\n{'preset':17}{'ratio of':14}{'to':22}median   range          fastest")
    for r in ratios:
        spread = f"{r['ratio']:6.2f} {r['low']:6.2f} ..{r['high']:6.2f} {r['fastest']:8.2f}"
        print(f"{r['preset']:17}{r['of']:14}{r['to']:22}{spread}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians with their range and the roofline's bound, one panel for each length."""
    pyplot = pictures.pyplot()

    lengths = report["settings"]["length"]
    timed = [row for row in report["rows"] if "times_ms" in row]
    tallest = max(sum(row["length"] == length for row in timed) for length in lengths)
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(7 * len(lengths), 1.5 + 0.25 * tallest), squeeze=False)
    for ax, length in zip(axes[0], lengths, strict=True):
        rows = [row for row in timed if row["length"] == length]
        medians = [row["median_ms"] for row in rows]
        low, high = ([abs(f(r["times_ms"]) - r["median_ms"]) for r in rows] for f in (min, max))
        color = ["C1" if r["name"] == "P" else "C0" if r["preset"] else "C7" for r in rows]
        ax.barh(range(len(rows)), medians, xerr=[low, high], color=color, error_kw={"linewidth": 0.8})
        ax.plot([r["bound_ms"] for r in rows], range(len(rows)), "k|", label="roofline bound")
        ax.set_yticks(range(len(rows)), [f"{r['preset']} {r['name']}".strip() for r in rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(f"length {length}, {report['settings']['dtype']}, {report['environment']['device']}", fontsize=9)
        ax.set_xlabel("ms, forward and backward")
        ax.legend(fontsize=8)
    figure.tight_layout()
    pictures.save(figure, path, 150, path.suffix.lstrip(".") or "png")


def environment(device: str) -> dict[str, str]:
    """Versions, device and the settings that decide speed; asked before the CPU engine answers for CUDA."""
    found = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    found["python"] = platform.python_version()
    names = ["torch", "megatron-core"]
    names += ["triton", "transformer_engine", "mamba_ssm", "causal_conv1d", "flash_attn"] if device == "cuda" else []
    for name in names:
        found[name] = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    connections = "CUDA_DEVICE_MAX_CONNECTIONS"
    return found | {connections: os.environ.get(connections, "not set")}


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = tool.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--recipe", help="sizes; default: paper-1b-intra")
    parser.add_argument("--size", choices=["small"], help="small sizes in place of a recipe's; the default on CPU")
    parser.add_argument("--length", help="tokens, such as 8192,32768; default: 8192, at small sizes 512")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 on CPU")
    parser.add_argument("--presets", default=",".join(PRESETS), help="of P layers; default: all")
    parser.add_argument("--layers", default="*WMP-", help="symbols; default: *WMP-")
    repeats = f"default: {BUDGET_MS / 1e3:g} s a layer, at least {FEWEST}, at most {MOST}"
    parser.add_argument("--repeats", type=int, help=repeats)
    parser.add_argument("--deterministic", action="store_true", help="Megatron's --deterministic-mode")
    parser.add_argument("--json", type=Path, help="write all results here too")
    parser.add_argument("--plot", type=Path, help="draw them (.png)")
    options, rest = parser.parse_known_args(argv)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda needs a CUDA device, and torch sees none; drop it")
    if options.size and options.recipe:
        parser.error("--size small and --recipe are both sizes; give one")
    if options.device == "cpu" and not options.recipe:
        options.size = "small"
    options.recipe = options.recipe or ("paper-100m-intra" if options.size else "paper-1b-intra")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    lengths = (options.length or ("512" if options.size else "8192")).split(",")
    if not all(word.isascii() and word.isdigit() and int(word) for word in lengths):
        parser.error(f"--length {options.length}: give whole numbers of tokens, such as 8192,32768")
    options.length = [int(word) for word in lengths]
    options.presets = options.presets.split(",")
    for preset in options.presets:
        if preset not in PRESETS:
            parser.error(f"--presets {preset}: the presets are {','.join(PRESETS)}")
    if not options.layers or not set(options.layers) <= set("*WMP-"):
        parser.error(f"--layers {options.layers}: choose from *WMP-")
    if options.micro_batch < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--micro-batch and --repeats must be at least 1")
    return options, rest


def run(bench: Bench, options: argparse.Namespace, peaks: dict[str, float]) -> dict[str, list]:
    """Measures and prints everything; ``rows`` and ``ratios``, those of one length after those of another."""
    designs, refused = {}, {}
    for preset in options.presets if "P" in options.layers else []:
        try:
            d = designs[preset] = bench.design(["--intra-preset", preset])
            print(f"{preset}: qk {d.qk_dim}, value {d.value_dim}, ssm {d.ssm_dim}")
        except ValueError as error:
            refused[preset] = str(error)
    found: dict[str, list] = {"rows": [], "ratios": []}
    for length in options.length:
        print(f"\nlength {length}, micro-batch {options.micro_batch}, {options.dtype}")
        print(f"{'preset':17}{'layer':22}median ms     min ..  max ms   tokens/s  peak MiB  bound ms roofline")
        stock = [Case(symbol, symbol) for symbol in options.layers if symbol != "P"]
        rows, ratios = bench.measure(stock, length, peaks), []
        print_rows(rows)
        for preset, d in designs.items():
            block = bench.measure(intra_cases(preset, d), length, peaks)
            print_rows(block)
            rows += block
            ratios += ratios_of(block, d)
        failed = [{"length": length, "preset": preset, "name": "P", "error": why} for preset, why in refused.items()]
        print_rows(failed)
        if ratios:
            print_ratios(ratios)
        found["rows"] += rows + failed
        found["ratios"] += ratios
    return found


def main(argv: list[str]) -> int:
    options, rest = parse_options(argv)
    command = shlex.join(["python", *sys.argv])
    found = environment(options.device)
    try:
        bench = Bench(options, rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "plot")} | {"warm_up": WARM_UP}
    print(command)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    print(", ".join(f"{k} {v}" for k, v in settings.items()))
    for note in bench.notes:
        print(note)
    peaks = measure_peaks(bench.dtype, bench.cuda)
    print(f"matrix product {peaks['flops_per_s'] / 1e12:.3g} TFLOP/s, copy {peaks['bytes_per_s'] / 1e9:.3g} GB/s")
    report: dict[str, Any] = {"command": command, "environment": found, "settings": settings, "peaks": peaks}
    report |= run(bench, options, peaks) | {"legend": LEGEND}
    print("\n" + LEGEND)
    bench.close()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot and any("times_ms" in row for row in report["rows"]):
        plot(report, options.plot)
    return 1 if any("error" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
