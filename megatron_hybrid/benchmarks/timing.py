"""Seconds and peak memory of a function, and what they were measured with."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def peak_memory(run: Callable, device: torch.device) -> int:
    """Bytes allocated at the worst moment of ``run``, beyond what was allocated before it.

    On a CPU the allocator's own events are replayed: unlike the resident size of the process,
    they do not depend on what ran before nor on when memory goes back to the system.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak


def seconds_of(run: Callable, device: torch.device) -> float:
    """By the clock, with the device waited for before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_us(run: Callable, host_ahead: bool = False) -> float:
    """Microseconds on the CUDA device, the median of 30 calls after 5 that do not count.

    Args:
        host_ahead: The device waits before each call, so that launches are not what is measured.
    """
    for _ in range(5):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(30)]
    for start, end in marks:
        if host_ahead:
            torch.cuda._sleep(200_000)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in marks)


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of Python and of what a kernel can be made with, and the GPU.

    more: Further distributions.
    """
    found = {"python": platform.python_version(), "machine": platform.processor()}
    for name in ("torch", "transformers", "mamba_ssm", "triton", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
