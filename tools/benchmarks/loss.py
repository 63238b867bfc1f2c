"""Compare ways to compute the loss of a language model and its gradients, output head included.

    python tools/benchmarks/loss.py [--tokens 32768] [--hidden 2048] [--vocabulary 128256] [--search] [--json out.json]

Forward and backward pass together, rounds interleaved, medians; the ratio is to the fused loss of this package. Each
way is first compared with the formula in float64 at a small size, losses and gradients; one that is wrong gets no
time. `products alone` is what the fused loss cannot do without. `--search` measures the configurations of the kernel
between the products, and chunks of other sizes.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.accounting import loss_chunks
from megatron_hybrid.accounting.loss_chunks import chunk_tokens
from megatron_hybrid.benchmarks.timing import peak_memory, seconds_of, versions
from megatron_hybrid.kernels.linear_cross_entropy import _add_product, linear_cross_entropy

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest entry: fp32 sums in another order; bf16 rounds logits and their gradients."""


def chunk_of(hidden: Tensor, weight: Tensor) -> int:
    return chunk_tokens(hidden.shape[0], weight.shape[0], weight.element_size())


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=chunk_of(hidden, weight))
    return (losses * mask).sum()


def recomputed(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses, *_ = linear_cross_entropy(hidden, weight, labels, chunk=chunk_of(hidden, weight))
    return (losses * mask).sum()


def megatrons(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, group = hidden[:, None] @ weight.t(), torch.distributed.group.WORLD  # [t, 1, v]
    return (vocab_parallel_cross_entropy(logits, labels[:, None], tp_group=group)[:, 0] * mask).sum()


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none") * mask).sum()


def ligers(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    ignored = labels.masked_fill(mask == 0, -100)
    return liger_fused_linear_cross_entropy(hidden, weight, ignored, reduction="sum", accum_dtype=torch.float32)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fused": fused,
    "fused, without a mask": recomputed,
    "Megatron's": megatrons,
    "torch's": torchs,
    "Liger's": ligers,
}


def products(hidden: Tensor, weight: Tensor) -> None:
    """Logits, and the two gradients, in the chunks of the fused loss."""
    chunk, total = chunk_of(hidden, weight), None
    with torch.no_grad():
        logits, gradient = hidden.new_empty(chunk, weight.shape[0]), torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            torch.mm(rows, weight.t(), out=logits[: len(rows)])
            torch.mm(logits[: len(rows)], weight, out=gradient[start : start + chunk])
            total = _add_product(total, logits[: len(rows)].t(), rows)


def inputs(tokens: int, h: int, v: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states [t, h], weight [v, h], labels [t], mask [t]."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, h, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (tokens,), generator=generator, device=device)
    return [hidden, weight, labels, (torch.rand(tokens, generator=generator, device=device) > 0.1).float()]


def forward_backward(way: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    total = way(*tensors)
    return total, *torch.autograd.grad(total / len(tensors[2]), tensors[:2])


def error_of(way: Callable[..., Tensor], device: str, dtype: torch.dtype) -> float:
    tensors = inputs(300, 128, 5000, device, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors[:2]] + tensors[2:]
    wanted = forward_backward(lambda h, w, y, m: (F.cross_entropy(h @ w.t(), y, reduction="none") * m).sum(), exact)
    got = forward_backward(way, tensors)
    pairs = zip(got, wanted, strict=True)
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in pairs)


def measure(args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    rows, steps = [], {}
    tensors = inputs(args.tokens, args.hidden, args.vocabulary, device, dtype)
    for name, way in [*WAYS.items(), ("products alone", None)]:
        row: dict = {"name": name}
        rows.append(row)
        try:
            if way is not None:
                row["error"] = error_of(way, device, dtype)
                if not row["error"] <= TOLERANCE[dtype]:
                    row["refused"] = f"wrong by {row['error']:.1e}"
                    continue
            run = partial(products, *tensors[:2]) if way is None else partial(forward_backward, way, tensors)
            run()
            row["peak_mib"] = peak_memory(run, torch.device(device)) / 2**20
            steps[name] = run
        except Exception as error:  # not installed, or not enough memory: the others are measured
            row["refused"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, run in steps.items():
            times[name].append(1e3 * seconds_of(run, torch.device(device)))
    for row in rows:
        if row["name"] in steps:
            row["times_ms"] = times[row["name"]]
            row["median_ms"] = statistics.median(row["times_ms"])
            row["ratio"] = statistics.median(a / b for a, b in zip(row["times_ms"], times["fused"], strict=True))
    return rows


def search(args: argparse.Namespace) -> list[dict]:
    """Milliseconds of the kernel on a chunk for each configuration, then of all for each size of the chunks."""
    from megatron_hybrid.kernels.triton import configs, cross_entropy

    device = torch.device("cuda")
    tensors = inputs(args.tokens, args.hidden, args.vocabulary, "cuda", torch.bfloat16)
    chunk = chunk_of(*tensors[:2])
    logits = torch.randn(chunk, args.vocabulary, device=device).bfloat16()
    labels, weights = tensors[2][:chunk], tensors[3][:chunk]
    known, rows = dict(configs.TABLE), []
    run: Callable[[], object]
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)):
        for stages in (1, 2, 3, 4):
            line = {"BLOCK": block, "STAGES": stages, "num_warps": warps}
            configs.TABLE.update({key: line for key in known if key[0] == "cross_entropy"})
            run = partial(cross_entropy.statistics, logits, labels, 0, weights)
            run()
            ms = 1e3 * statistics.median(seconds_of(run, device) for _ in range(args.repeats))
            rows.append({**line, "ms": ms})
            print(f"{rows[-1]}, {2 * logits.nbytes / ms / 1e9:.2f} TB/s of one reading and one writing")
    configs.TABLE.update(known)
    del logits
    whole = loss_chunks.CHUNK_BYTES
    for power in range(28, 34):
        loss_chunks.CHUNK_BYTES = 2**power
        run = partial(forward_backward, fused, tensors)
        run()
        ms = 1e3 * statistics.median(seconds_of(run, device) for _ in range(args.repeats))
        rows.append({"chunk": chunk_of(*tensors[:2]), "ms": ms})
        print(f"{rows[-1]}")
    loss_chunks.CHUNK_BYTES = whole
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value in (("tokens", 32768), ("hidden", 2048), ("vocabulary", 128256), ("repeats", 9)):
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--search", action="store_true", help="measure configurations of the kernel, and chunks, too")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if args.search and args.device == "cpu":
        parser.error("--search is of CUDA kernels")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.distributed.init_process_group(
        "nccl" if args.device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    command, found = shlex.join(["python", *sys.argv]), versions()
    print(command)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    sizes = f"{args.tokens} tokens, hidden size {args.hidden}, vocabulary of {args.vocabulary}"
    title = f"{args.device}, {str(dtype).removeprefix('torch.')}, forward + backward: {sizes}"
    rows = measure(args, args.device, dtype)
    print(f"\n{title}, {args.repeats} rounds")
    print("way                     median ms   min .. max ms    ratio  peak MiB    error")
    for row in rows:
        if "refused" in row:
            print(f"{row['name']:23} not run: {row['refused'][:90]}")
            continue
        low, high = min(row["times_ms"]), max(row["times_ms"])
        error = f"{row['error']:.1e}" if "error" in row else ""
        print(
            f"{row['name']:23} {row['median_ms']:9.3f} {low:7.3f} .. {high:7.3f} {row['ratio']:6.2f}"
            f" {row['peak_mib']:9.1f}  {error}"
        )
    searched = search(args) if args.search else []
    if args.json:
        report = {"command": command, "versions": found, "title": title, "rows": rows, "search": searched}
        args.json.write_text(json.dumps(report) + "\n")
    torch.distributed.destroy_process_group()
    return 0 if "median_ms" in rows[0] else 1


if __name__ == "__main__":
    sys.exit(main())
