"""Time and memory of the plain-PyTorch SSD scan against other implementations.

    python tools/benchmarks/kernels.py [--compile] [--json out.json]

Each implementation is first checked against the float64 recurrence, outputs and gradients; one
that is wrong gets no time. Repeats are interleaved, so that a busy machine slows all rows alike;
ratios are medians of ratios within one round, to the fastest and leanest baseline of the run.
Baselines: ``transformers``' Mamba-2 torch path, the minimal formulation of the Mamba-2 paper, and
mamba_ssm's Triton kernel on CUDA when installed (shown, but not part of the ratio).
"""

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.benchmarks.timing import peak_memory, seconds_of, versions
from megatron_hybrid.kernels import NEEDED, ssm_kernels
from megatron_hybrid.kernels.ssd import ssd_chunk_scan, ssd_recurrence

NAMES = ("x", "dt", "A", "B", "C", "D")
# Relative to the largest entry: fp32 rounding over a chunk; bf16 rounds inputs of each product.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def ssd_minimal(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor):
    """The four steps of listing 1 of the Mamba-2 paper (arXiv:2405.21060), with einsum.

    The listing has one dtype throughout: bf16 inputs are computed in fp32, and y returned in x's dtype.
    """
    heads, chunks, dtype = x.shape[2], x.shape[1] // chunk_size, x.dtype
    x, B, C = (t.to(torch.promote_types(dtype, torch.float32)) for t in (x, B, C))

    def segment_sums(a: Tensor) -> Tensor:
        """[..., t] -> [..., t, t]: the sum over (j, i], minus infinity for j > i."""
        t = a.shape[-1]
        rows = a[..., None].expand(*a.shape, t)
        lower = torch.ones(t, t, dtype=torch.bool, device=a.device).tril()
        sums = rows.masked_fill(~lower.tril(-1), 0).cumsum(-2)
        return sums.masked_fill(~lower, -torch.inf)

    a = (dt * A).unflatten(1, (chunks, chunk_size)).permute(0, 3, 1, 2)
    X = (x * dt[..., None]).unflatten(1, (chunks, chunk_size))
    B, C = (t.repeat_interleave(heads // t.shape[2], 2).unflatten(1, (chunks, chunk_size)) for t in (B, C))
    total = a.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(a).exp(), X)
    to_end = (total[..., -1:] - total).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    carry = segment_sums(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", carry, states)[:, :-1]
    outside = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, total.exp())
    return ((inside + outside).flatten(1, 2) + D[:, None] * x).to(dtype)


def implementations(device: torch.device, with_compile: bool) -> tuple[dict[str, Callable], set]:
    """Name -> scan(x, dt, A, B, C, chunk_size, D=D), and the names of the eager baselines."""
    rows: dict[str, Callable] = {"ours": ssd_chunk_scan, "ssd_minimal": ssd_minimal}
    if importlib.util.find_spec("transformers"):
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        rows["transformers"] = mamba2_chunk_scan
    else:
        print("transformers is not installed: its row is left out (pip install transformers)")
    baselines = set(rows) - {"ours"}
    if with_compile:
        rows["ours, compiled"] = torch.compile(ssd_chunk_scan)
    if device.type == "cuda" and all(importlib.util.find_spec(name) for name in NEEDED["mamba_ssm"]):
        rows["mamba_ssm"] = ssm_kernels(device, "mamba_ssm").chunk_scan
    return rows, baselines


def make_inputs(length: int, heads: int, args: argparse.Namespace, device, dtype) -> dict[str, Tensor]:
    """Step sizes in [0, 0.1) and A in (-16, -1], as Mamba-2 initialises them."""
    gen = torch.Generator().manual_seed(0)
    rate = -(1 + 15 * torch.rand(heads, generator=gen))
    inputs = {
        "x": torch.randn(args.batch, length, heads, args.head_dim, generator=gen).to(dtype),
        "dt": torch.rand(args.batch, length, heads, generator=gen) * 0.1,
        "A": rate,
        "B": torch.randn(args.batch, length, args.groups, args.state, generator=gen).to(dtype),
        "C": torch.randn(args.batch, length, args.groups, args.state, generator=gen).to(dtype),
        "D": torch.randn(heads, generator=gen),
    }
    return {k: t.to(device).requires_grad_() for k, t in inputs.items()}


def forward_backward(scan: Callable, inputs: dict[str, Tensor], dy: Tensor, *chunk) -> tuple:
    """y and the gradients of all inputs."""
    x, dt, A, B, C, D = (inputs[k] for k in NAMES)
    y = scan(x, dt, A, B, C, *chunk, D=D)
    return y, *torch.autograd.grad(y, (x, dt, A, B, C, D), dy.to(y.dtype))


def errors_of(rows: dict[str, Callable], chunk: int, args, device, dtype) -> dict[str, float]:
    """Largest relative error of y and all gradients, over two chunks and two heads a group."""
    inputs = make_inputs(2 * chunk, 2 * args.groups, args, device, dtype)
    exact = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    dy = dy.to(device, dtype)
    wanted = forward_backward(ssd_recurrence, exact, dy)
    errors = {}
    for name, scan in rows.items():
        got = forward_backward(scan, inputs, dy, chunk)
        errors[name] = max(
            ((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, wanted, strict=True)
        )
    return errors


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One row for each implementation and chunk size, those that fail the check without a time."""
    rows, baselines = implementations(device, args.compile)
    inputs = make_inputs(args.length, args.heads, args, device, dtype)
    dy = torch.randn_like(inputs["x"])
    results, runs = [], {}
    for chunk in args.chunk_sizes:
        errors = errors_of(rows, chunk, args, device, dtype)
        for name, scan in rows.items():
            row = {"name": name, "chunk": chunk, "baseline": name in baselines}
            row["error"] = errors[name]
            row["correct"] = row["error"] <= TOLERANCE[dtype]
            results.append(row)
            if row["correct"]:
                run = runs[name, chunk] = lambda s=scan, c=chunk: forward_backward(s, inputs, dy, c)
                for _ in range(args.warmup):
                    run()
                row["peak_mib"] = peak_memory(run, device) / 2**20
    times: dict = {key: [] for key in runs}
    for _ in range(args.repeats):
        for key, run in runs.items():
            times[key].append(1e3 * seconds_of(run, device))
    timed = [row for row in results if row["correct"]]
    for row in timed:
        row["times_ms"] = times[row["name"], row["chunk"]]
        row["median_ms"] = statistics.median(row["times_ms"])
    rivals = [row for row in timed if row["baseline"]]
    if rivals:
        fastest = min(rivals, key=lambda row: row["median_ms"])
        leanest = min(row["peak_mib"] for row in rivals)
        for row in timed:
            pairs = zip(row["times_ms"], fastest["times_ms"], strict=True)
            row["time_ratio"] = statistics.median(a / b for a, b in pairs)
            row["memory_ratio"] = row["peak_mib"] / leanest
    return results


def print_table(results: list[dict], title: str) -> None:
    print(f"\n{title}")
    print("implementation   chunk  median ms   min .. max ms       ratio  peak MiB  ratio    error")
    for row in results:
        head = f"{row['name']:16} {row['chunk']:5}"
        if not row["correct"]:
            print(f"{head}  WRONG: no time is reported{'':34} {row['error']:.1e}")
            continue
        low, high = min(row["times_ms"]), max(row["times_ms"])
        ratios = [row.get("time_ratio", float("nan")), row.get("memory_ratio", float("nan"))]
        print(
            f"{head} {row['median_ms']:10.2f} {low:8.2f} .. {high:8.2f} {ratios[0]:9.2f}"
            f" {row['peak_mib']:9.1f} {ratios[1]:6.2f}  {row['error']:.1e}"
        )
    print("ratio: to the fastest (leanest) of the baselines at its best chunk size; below 1 is better")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value in (
        ("length", 2048), ("heads", 16), ("head-dim", 64), ("state", 128), ("groups", 1),
        ("batch", 1), ("threads", 2), ("warmup", 2), ("repeats", 9),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: all there are")
    parser.add_argument("--compile", action="store_true", help="add a torch.compile row")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none; use --device cpu")
    for chunk in args.chunk_sizes:
        if chunk < 1 or args.length % chunk:
            parser.error(f"--chunk-sizes {chunk} does not divide --length {args.length}, as the "
                         "minimal formulation needs; choose a divisor")  # fmt: skip
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", *sys.argv])
    found = versions()
    print(command)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    cases = [] if args.device == "cuda" else [("cpu", torch.float32)]
    if args.device != "cpu" and torch.cuda.is_available():
        cases += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    report: dict = {"command": command, "versions": found, "cases": []}
    for name, dtype in cases:
        title = (
            f"{name}, {str(dtype).removeprefix('torch.')}, forward + backward: batch {args.batch}, "
            f"length {args.length}, {args.heads} heads x {args.head_dim}, state {args.state}, "
            f"{args.groups} group(s), {args.threads} threads, {args.repeats} rounds"
        )
        results = measure(args, torch.device(name), dtype)
        print_table(results, title)
        report["cases"].append({"title": title, "results": results})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    correct = all(row["correct"] for case in report["cases"] for row in case["results"])
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
