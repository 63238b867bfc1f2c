"""Time of the products, norms and fusions around the mixers of a layer, forward and backward, on CUDA.

    python tools/benchmarks/blocks.py [--tokens 32768] [--json out.json]
    python tools/benchmarks/blocks.py --search

Products: an input projection of 6,834 rows (P at 1B), as it is, padded to 6,840 as the layers do it, and as it is but
into rows of 6,840; weight gradients that are added to an fp32 buffer afterwards and inside the product. Norms and
fusions: torch's operations and the Triton kernels; GB/s counts what must move, each tensor once. ``--search`` times
other lines of the table of configurations and prints the fastest ones as the table has them.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.benchmarks.timing import median_us, versions
from megatron_hybrid.kernels import branches, norms
from megatron_hybrid.kernels.triton import configs
from megatron_hybrid.kernels.weight_gradient import accumulate

HIDDEN, ROWS, PADDED = 2048, 6834, 6840


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def products(tokens: int) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call and FLOPs."""
    flops = 2.0 * tokens * HIDDEN * ROWS
    x, w, dy = make(tokens, HIDDEN), make(ROWS, HIDDEN), make(tokens, ROWS)
    wide_w, wide_dy = F.pad(w, (0, 0, 0, PADDED - ROWS)), F.pad(dy, (0, PADDED - ROWS))
    rows, total = wide_dy[:, :ROWS], torch.zeros(ROWS, HIDDEN, device="cuda")
    yield "y: 6834", lambda: x @ w.t(), flops
    yield "y: padded, with its copy of the weight", lambda: x @ F.pad(w, (0, 0, 0, PADDED - ROWS)).t(), flops
    yield "y: 6834 in rows of 6840", lambda: torch.mm(x, w.t(), out=rows), flops
    yield "dx: 6834", lambda: dy @ w, flops
    yield "dx: padded", lambda: wide_dy @ wide_w, flops
    yield "dx: 6834 in rows of 6840", lambda: rows @ w, flops
    yield "dw: 6834, then added", lambda: total.add_(dy.t() @ x), flops
    yield "dw: padded, then added", lambda: total.add_((wide_dy.t() @ x)[:ROWS]), flops
    yield "dw: added inside, 6834", lambda: accumulate(total, dy, x), flops
    yield "dw: added inside, 6834 in rows of 6840", lambda: accumulate(total, rows, x), flops
    yield "dw: added inside, 6832 + 2 (the layers)", lambda: accumulate(total, wide_dy, x), flops
    even = torch.zeros(PADDED, HIDDEN, device="cuda")
    yield "dw: added inside, 6840", lambda: accumulate(even, wide_dy, x), flops


def gradients(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Callable[[], Any]]:
    """Makes the forward and backward pass of a function of tensors."""
    return lambda: _gradients(run, inputs)


def _gradients(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [torch.randn_like(y) for y in outputs]

    def both() -> Any:
        made = run(*leaves)
        return torch.autograd.grad(made if isinstance(made, tuple) else (made,), leaves, dys)

    return both


def passes(tokens: int) -> Iterator[tuple[str, Callable[[], Callable[[], Any]], float]]:
    """Name, what makes the call, and bytes of norms and fusions, forward and backward."""
    for width, groups in ((HIDDEN, 1), (4096, 1), (2304, 18)):
        x, w = make(tokens, 1, width), make(width)
        size = x.numel() * 2

        def by_torch(x: Tensor, w: Tensor, groups: int = groups) -> Tensor:
            split = F.rms_norm(x.unflatten(-1, (groups, -1)), (x.shape[-1] // groups,), eps=1e-5)
            return split.flatten(-2) * w if groups > 1 else F.rms_norm(x, w.shape, w, 1e-5)

        what = f"norm {width}" + (f" in {groups} groups" if groups > 1 else "")
        yield f"{what}: torch", gradients(by_torch, [x, w]), 5 * size
        yield f"{what}: ours", gradients(lambda x, w, g=groups: norms.rms_norm(x, w, 1e-5, g)[0], [x, w]), 5 * size
        if groups == 1:
            beside = gradients(lambda x, w, f=by_torch: (f(x, w), x.view_as(x)), [x, w])
            yield f"{what} and residual: torch", beside, 6 * size
            yield f"{what} and residual: ours", gradients(lambda x, w: norms.rms_norm(x, w, 1e-5), [x, w]), 6 * size
    for name, widths, two, fusion in (
        ("concat, 16 and 18 groups", (2048, 2304), (16, 18), "concat"),
        ("add, 16 groups", (2048, 2048), (16, 16), "add"),
    ):
        inputs = [*(make(tokens, 1, w) for w in widths), *(make(w) for w in widths)]
        written = sum(widths) if fusion == "concat" else widths[0]
        size = 2 * tokens * (sum(widths) + written + written + 2 * sum(widths))

        def formula(x1: Tensor, x2: Tensor, f1: Tensor, f2: Tensor, g: Any = two, fusion: str = fusion) -> Tensor:
            split = [x.unflatten(-1, (n, -1)) for x, n in zip((x1, x2), g, strict=True)]  # [t, 1, g, w]
            normed = [F.rms_norm(x, x.shape[-1:], eps=1e-5).flatten(-2) for x in split]
            ys = [y * f for y, f in zip(normed, (f1, f2), strict=True)]
            return torch.cat(ys, -1) if fusion == "concat" else ys[0] + ys[1]

        def kernel(x1: Tensor, x2: Tensor, f1: Tensor, f2: Tensor, g: Any = two, fusion: str = fusion) -> Tensor:
            return branches.fuse((x1, x2), (f1, f2), g, 1e-5, fusion)

        yield f"fusion {name}: torch", gradients(formula, inputs), size
        yield f"fusion {name}: torch, compiled", gradients(torch.compile(formula), inputs), size
        yield f"fusion {name}: ours", gradients(kernel, inputs), size


SEARCHED = {
    ("rms_norm", "2048"): f"norm {HIDDEN} and residual: ours",
    ("rms_norm", "4096"): "norm 4096: ours",
    ("rms_norm", "256"): "norm 2304 in 18 groups: ours",
    ("branch_fusion", "256"): "fusion add, 16 groups: ours",
}
"""Kernel and class to the row that decides."""


def lines(kernel: str, shape_class: str, direction: str) -> Iterator[dict[str, int]]:
    """Lines to try."""
    tile_rows = (4, 8, 16, 32) if shape_class == "256" else (1, 2)
    for rows, warps in itertools.product(tile_rows, (2, 4, 8)):
        if direction == "forward":
            yield {"ROWS": rows, "num_warps": warps}
            continue
        for programs, stages in itertools.product((132, 264, 528, 792, 1056, 2112), (1, 2, 3)):
            yield {"ROWS": rows, "PROGRAMS": programs, "STAGES": stages, "num_warps": warps}


def search(tokens: int) -> None:
    """Prints the fastest line of each kernel and class, one direction after the other."""
    for (kernel, shape_class), row in SEARCHED.items():
        (run,) = (make_run() for name, make_run, _ in passes(tokens) if name == row)
        for direction in ("forward", "backward"):
            key = (f"{kernel}_{direction}", shape_class)
            kept, times = configs.TABLE[key], []
            for line in lines(kernel, shape_class, direction):
                configs.TABLE[key] = line
                times.append((median_us(run), line))
            configs.TABLE[key] = kept
            best, line = min(times, key=lambda found: found[0])
            print(f"    {key}: {line},  # {best:.1f} us both ways, {median_us(run):.1f} with its line now", flush=True)


def timed(name: str, run: Callable[[], Any], amount: float, unit: str) -> dict[str, Any]:
    """A printed row; ``amount`` over microseconds is in the unit."""
    us = median_us(run)
    print(f"{name:45}{us:10.1f} us {amount / us:9.1f} {unit}", flush=True)
    return {"name": name, "us": us, unit: amount / us}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device, and these kernels run on no other")
    if options.search:
        search(options.tokens)
        return 0
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), "rows": []}
    print(report["command"], *(f"{k} {v}" for k, v in report["versions"].items()), sep="\n")
    for name, run, flops in products(options.tokens):
        report["rows"].append(timed(name, run, flops / 1e6, "TFLOP/s"))
    for name, make_run, moved in passes(options.tokens):
        report["rows"].append(timed(name, make_run(), moved / 1e3, "GB/s"))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
