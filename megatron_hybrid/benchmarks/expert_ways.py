"""One layer of experts in the ways in which it can be computed, for tools/benchmarks/experts.py."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_hybrid.benchmarks.single_layers import Bench, Case, forward_flops, times_ms
from megatron_hybrid.layers.moe import module
from megatron_hybrid.patches import experts, patching, swiglu_kernels


class Way(NamedTuple):
    """How a layer of experts is computed."""

    patched: bool = True
    """Tokens on their way, the router's product and SwiGLU as patches/ has them."""
    fused: bool = True
    """SwiGLU by our kernel, as kernels/expert_ffn.py has it."""
    rows_for_own_product: float = 0
    """In place of ``module.ROWS_FOR_OWN_PRODUCT``."""


WAYS = {
    "upstream's permutation, grouped": Way(False, False, float("inf")),
    "one pass each, grouped": Way(rows_for_own_product=float("inf")),
    "one pass each, one by one": Way(),
}
"""The first is what a run has without our kernels; all have the same layer and input."""

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@contextlib.contextmanager
def going(way: Way) -> Iterator[None]:
    """Layers of experts are computed in this way while the block runs."""
    kept = module.is_swiglu, module.ROWS_FOR_OWN_PRODUCT
    tables = (experts.TABLE, swiglu_kernels.TABLE)
    if not way.patched:
        for table in tables:
            patching.uninstall(table.name)
    if not way.fused:
        module.is_swiglu = lambda config: False
    module.ROWS_FOR_OWN_PRODUCT = way.rows_for_own_product  # type: ignore[assignment]
    try:
        yield
    finally:
        module.is_swiglu, module.ROWS_FOR_OWN_PRODUCT = kept
        for table in tables:
            patching.install(table)


def measure(bench: Bench, length: int, peaks: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, Counter]]:
    """A row for each of :data:`WAYS`, and the milliseconds of a step by kernel.

    Args:
        bench: On CUDA.
        length: Tokens of a sample.
        peaks: As of ``single_layers.measure_peaks``.
    """
    layers, sizes = bench.build(Case("E", "E"), length)
    step = bench.step(layers, length, sizes.hidden)

    def run(way: Way) -> None:
        with going(way):
            step()

    steps: list[Callable] = [partial(run, way) for way in WAYS.values()]
    for one in steps:
        one()
    tokens = length * bench.options.micro_batch
    bound = 3e3 * tokens * forward_flops("E", sizes, "") / peaks["flops_per_s"]
    rows, kernels = [], {}
    for name, one, times in zip(WAYS, steps, times_ms(steps, bench.options.repeats), strict=True):
        kernels[name], waits = by_kernel(one)
        median = statistics.median(times)
        figures = {"times_ms": times, "median_ms": median, "bound_ms": bound, "share_percent": 100 * bound / median}
        busy = sum(kernels[name].values())
        rows.append({"length": length, "name": name, **figures, "busy_ms": busy, "waits": waits})
    return rows, kernels


def by_kernel(step: Callable, count: int = 3) -> tuple[Counter, float]:
    """Milliseconds on the device by kernel, and how often the host waited for it; of one step."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for _ in range(count):
            step()
    found: Counter = Counter()
    waits = 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.device_time_total / 1e3 / count
        waits += event.name in WAITS
    return found, (waits - 1) / count  # the profiler itself waits at the end
