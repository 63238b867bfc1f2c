"""What a GPU did in a step: its kernels by class, and the time that it waited.

Kernels are known by their names alone, those of this package with the name of their file before it. The plain loss is
made of torch's elementwise and reducing kernels, so it counts under ``elementwise and copies``.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

CLASSES = (
    ("communication", r"nccl"),
    ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
    ("8 bits", r"cast_(only|transpose|vec)|quantiz|amax|delayed_scaling|block_scal|compute_scale|^transpose_kernel"),
    ("attention", r"flash|fmha|sdpa|flex_?att|attn|attention|cudnn::fusion|convert_d[qkv]"),
    ("loss", r"cross_?entropy|log_?softmax|nll|vocab|logits"),
    ("convolution", r"conv(?!ert)"),
    ("scan", r"chunk|state_passing|ssd|mamba|^scan"),
    ("experts", r"expert|permut|router|moe"),
    ("norms", r"norm|branch_fusion"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitk|matmul"),
    (
        "elementwise and copies",
        r"elementwise|copy|memcpy|memset|fill|reduce|cat|index|gather|scatter|embedding|swiglu|rotary|triton_(poi|red|per)",
    ),
)
"""Classes and what the names of their kernels contain, in any case; the first that fits is a kernel's."""
OTHER = "other"
OWN = "megatron_hybrid.kernels.triton."


class Kernel(NamedTuple):
    """One run of a kernel, or a copy."""

    name: str
    start: int
    """Nanoseconds."""
    duration: int


def own_names() -> dict[str, str]:
    """Names of the Triton kernels of this package that are imported, to ``file.name``; a name of several files has all
    of them."""
    files: dict[str, list[str]] = {}
    for module in [name for name in sys.modules if name.startswith(OWN)]:
        for name, found in vars(sys.modules[module]).items():
            if getattr(found, "__module__", "") == module and hasattr(found, "warmup"):
                files.setdefault(name, []).append(module.removeprefix(OWN))
    return {name: f"{'/'.join(sorted(of))}.{name}" for name, of in files.items()}


def class_of(name: str) -> str:
    """The class of a kernel."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def busy(kernels: Iterable[Kernel]) -> int:
    """Nanoseconds in which at least one kernel runs."""
    total = end = 0
    for kernel in sorted(kernels, key=lambda k: k.start):
        stop = kernel.start + kernel.duration
        total += max(0, stop - max(end, kernel.start))
        end = max(end, stop)
    return total


def by_name(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """``name``, ``class``, ``count`` and ``ms`` of each kernel, the longest first."""
    sums: dict[str, list[int]] = {}
    for kernel in kernels:
        row = sums.setdefault(kernel.name, [0, 0])
        row[0] += 1
        row[1] += kernel.duration
    rows = [{"name": n, "class": class_of(n), "count": c, "ms": ns / 1e6} for n, (c, ns) in sums.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def by_class(named: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each class, from the rows of :func:`by_name`; those that have none are left out."""
    sums = {label: 0.0 for label in [*(label for label, _ in CLASSES), OTHER]}
    for row in named:
        sums[row["class"]] += row["ms"]
    return {label: ms for label, ms in sums.items() if ms}
