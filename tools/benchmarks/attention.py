"""Compare methods of causal attention whose values are wider than its queries.

    python tools/benchmarks/attention.py [--length 8192] [--qk-dim 72] [--value-dim 128] [--json out.json]

P layers have such heads (72 and 128 channels in the paper's at 1B). Each way is first compared with the formula at a
short length, output and gradients; one that is wrong, or that torch refuses on this device, gets no time. Forward and
backward pass together, rounds interleaved, medians; the ratio is to the way that the layers take.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hybrid.benchmarks.timing import peak_memory, seconds_of, versions
from megatron_hybrid.kernels.attention import _compiled_flex_attention, attention, attention_reference

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest entry: fp32 sums in another order; bf16 rounds the weights and each product's inputs."""


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, q.shape[-1] ** -0.5)


def padded(backend: SDPBackend) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, width = q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1])
        q, k = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    return run


def unequal(backend: SDPBackend) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two calls, each with all scores and half of V, padded to one width."""
    scale, parts = q.shape[-1] ** -0.5, v.chunk(2, -1)
    width = max(q.shape[-1], parts[0].shape[-1])
    q, k = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = [
            F.scaled_dot_product_attention(
                q, k, F.pad(p, (0, width - p.shape[-1])), is_causal=True, scale=scale, enable_gqa=True
            )[..., : p.shape[-1]]
            for p in parts
        ]
    return torch.cat(out, -1)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    key = q.shape[2]
    if key not in _MASKS:
        _MASKS[key] = create_block_mask(lambda b, h, i, j: i >= j, None, None, key, key, device=q.device)
    return _compiled_flex_attention()(q, k, v, block_mask=_MASKS[key], enable_gqa=True)


_MASKS: dict[int, object] = {}

WAYS: dict[str, Callable] = {
    "ours": ours,
    "padded, flash": padded(SDPBackend.FLASH_ATTENTION),
    "padded, cuDNN": padded(SDPBackend.CUDNN_ATTENTION),
    "unequal, torch's choice": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "unequal, flash": unequal(SDPBackend.FLASH_ATTENTION),
    "unequal, cuDNN": unequal(SDPBackend.CUDNN_ATTENTION),
    "unequal, efficient": unequal(SDPBackend.EFFICIENT_ATTENTION),
    "halves of V, flash": halves,
    "FlexAttention": flex,
}


def inputs(args: argparse.Namespace, length: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [b, heads, s, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(args.heads, args.qk_dim), (args.groups, args.qk_dim), (args.groups, args.value_dim)]
    made = [torch.randn(args.batch, n, length, d, generator=generator) for n, d in shapes]
    return [t.to(device, dtype).requires_grad_() for t in made]


def forward_backward(way: Callable, tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = way(*tensors)
    return y, *torch.autograd.grad(y, tensors, dy)


def error_of(way: Callable, args: argparse.Namespace, device: str, dtype: torch.dtype) -> float:
    tensors = inputs(args, 256, device, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn(args.batch, args.heads, 256, args.value_dim, device=device, dtype=dtype)
    got = forward_backward(way, tensors, dy)
    scale = args.qk_dim**-0.5
    wanted = forward_backward(lambda q, k, v: attention_reference(q, k, v, scale), exact, dy.double())
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True))


def measure(args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    rows, steps = [], {}
    tensors = inputs(args, args.length, device, dtype)
    dy = torch.randn(args.batch, args.heads, args.length, args.value_dim, device=device, dtype=dtype)
    for name, way in WAYS.items():
        row: dict = {"name": name}
        rows.append(row)
        try:
            row["error"] = error_of(way, args, device, dtype)
            if not row["error"] <= TOLERANCE[dtype]:
                row["refused"] = "wrong"
                continue
            run = steps[name] = lambda way=way: forward_backward(way, tensors, dy)
            run()
            row["peak_mib"] = peak_memory(run, torch.device(device)) / 2**20
        except Exception as error:  # torch has no kernel for it here: the others are measured
            row["refused"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, run in steps.items():
            times[name].append(1e3 * seconds_of(run, torch.device(device)))
    for row in rows:
        if row["name"] in times and "refused" not in row:
            row["times_ms"] = times[row["name"]]
            row["median_ms"] = statistics.median(row["times_ms"])
            pairs = zip(row["times_ms"], times.get("ours", row["times_ms"]), strict=True)
            row["ratio"] = statistics.median(a / b for a, b in pairs)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value in (
        ("length", 8192), ("batch", 1), ("heads", 16), ("groups", 4), ("qk-dim", 72), ("value-dim", 128),
        ("repeats", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if args.heads % args.groups:
        parser.error(f"--heads {args.heads} must be a multiple of --groups {args.groups}")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    command, found = shlex.join(["python", *sys.argv]), versions()
    print(command)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    title = (
        f"{args.device}, {str(dtype).removeprefix('torch.')}, forward + backward: batch {args.batch}, length "
        f"{args.length}, {args.heads} heads ({args.groups} of keys), {args.qk_dim} and {args.value_dim} channels"
    )
    rows = measure(args, args.device, dtype)
    print(f"\n{title}, {args.repeats} rounds")
    print("way                     median ms   min .. max ms    ratio  peak MiB    error")
    for row in rows:
        if "refused" in row:
            print(f"{row['name']:23} not run: {row['refused'][:90]}")
            continue
        low, high = min(row["times_ms"]), max(row["times_ms"])
        print(
            f"{row['name']:23} {row['median_ms']:9.3f} {low:7.3f} .. {high:7.3f} {row['ratio']:6.2f}"
            f" {row['peak_mib']:9.1f}  {row['error']:.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps({"command": command, "versions": found, "title": title, "rows": rows}) + "\n")
    return 0 if "median_ms" in rows[0] else 1


if __name__ == "__main__":
    sys.exit(main())
