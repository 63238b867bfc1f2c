"""A run of pretrain_hybrid.py whose steps are timed, as a process that is ready before it has its turn.

    python -m megatron_hybrid.benchmarks.measured_run FOLDER

imports what a run needs, waits for ``FOLDER/go.json`` (:class:`Job`) and runs. Rank 0 writes ``FOLDER/result.json``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GO, RESULT = "go.json", "result.json"


@dataclass(frozen=True)
class Job:
    """What a process is to run and to measure."""

    argv: list[str]
    warm_up: int
    """Steps before those that are timed."""
    steps: int
    """That are timed."""
    profile: bool
    """One more step, of which the GPU's kernels are recorded."""
    tuning: str = ""
    """File of :mod:`megatron_hybrid.benchmarks.rival_tuning`: read where it is there, else written."""

    @property
    def length(self) -> int:
        """Steps of the run."""
        return self.warm_up + self.steps + self.profile


@dataclass
class Measured:
    """Seconds and what else rank 0 finds; bytes and nanoseconds where named so."""

    start_seconds: float = 0.0
    """From the turn of the process to the first step, without imports that were done before."""
    first_step_seconds: float = 0.0
    """From the first forward pass to the end of the first step."""
    compiled: int = 0
    """Triton kernels that the first step has added to their cache on disk."""
    seconds: list[float] = field(default_factory=list)
    """Of the timed steps: from the end of one to the end of the next, line of the log included."""
    peak_bytes: int = 0
    """Allocated on the GPU; on a CPU resident."""
    profiled_seconds: float = 0.0
    busy_ns: int = 0
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """Rows of :func:`megatron_hybrid.benchmarks.kernel_classes.by_name`."""
    tuned: int = 0
    """Configurations of mamba_ssm's kernels that an earlier process has chosen."""


class Watch:
    """The hook around Megatron's ``train_step``."""

    def __init__(self, job: Job, turn: float, folder: Path):
        self.job, self.turn, self.folder = job, turn, folder
        self.found, self.done, self.last, self.cached = Measured(), 0, 0.0, 0

    def hook(self, there: Callable) -> Callable:
        def train_step(*args: Any, **kwargs: Any) -> Any:
            return self.step(lambda: there(*args, **kwargs))

        return train_step

    def step(self, call: Callable[[], Any]) -> Any:
        timed = self.job.warm_up + self.job.steps
        if self.done == 0:
            self.found.start_seconds = time.perf_counter() - self.turn
            self._take_tuning()
            self.cached, self.last = _compiled_kernels(), time.perf_counter()
        if self.done < timed:
            result = call()
            self._timed()
        else:
            result = self._profiled(call)
        self.done += 1
        if self.done >= timed:  # before the profile, too: what is measured is kept, whatever comes of that
            self._write()
        return result

    def _timed(self) -> None:
        _wait()
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if self.done == 0:
            self.found.first_step_seconds = seconds
            self.found.compiled = _compiled_kernels() - self.cached
        if self.done >= self.job.warm_up:
            self.found.seconds.append(seconds)
        if self.done == self.job.warm_up + self.job.steps - 1:
            self.found.peak_bytes = _peak_bytes()
            self.last = time.perf_counter()

    def _profiled(self, call: Callable[[], Any]) -> Any:
        import torch
        from torch.autograd import DeviceType

        from megatron_hybrid.benchmarks.kernel_classes import Kernel, busy, by_name, own_names

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            result = call()
            _wait()
            self.found.profiled_seconds = time.perf_counter() - start
        events = profile.profiler.kineto_results.events()
        on_gpu = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
        own = own_names()
        kernels = [Kernel(own.get(e.name(), e.name()), e.start_ns(), e.duration_ns()) for e in on_gpu]
        self.found.busy_ns, self.found.kernels = busy(kernels), by_name(kernels)
        return result

    def _take_tuning(self) -> None:
        from megatron_hybrid.benchmarks import rival_tuning

        if self.job.tuning and Path(self.job.tuning).exists():
            self.found.tuned = rival_tuning.load(Path(self.job.tuning))

    def _write(self) -> None:
        from megatron.training.global_vars import get_args

        from megatron_hybrid.benchmarks import rival_tuning

        args = get_args()
        if args.rank:
            return
        if self.job.tuning and any(tuner.cache for _, tuner in rival_tuning.tuners()):
            rival_tuning.save(Path(self.job.tuning))
        text = json.dumps({**asdict(self.found), **_about(args)}, indent=1)
        temporary = self.folder / f"{RESULT}.tmp"
        temporary.write_text(text + "\n")
        temporary.replace(self.folder / RESULT)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():  # the CPU engine answers for it, too
        torch.cuda.synchronize()


def _compiled_kernels() -> int:
    """Triton's cache on disk: a folder for each kernel."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton/cache"))
    return sum(1 for _ in cache.iterdir()) if cache.is_dir() else 0


def _peak_bytes() -> int:
    from megatron_hybrid.training.throughput import peak_memory

    return next(iter(peak_memory().values()))


def _about(args: Any) -> dict[str, Any]:
    """What the run is: pattern, batch, work and the peak that its MFU is stated against."""
    from megatron_hybrid import costs, pattern
    from megatron_hybrid.training import throughput

    layers, sizes = pattern.parse(args.hybrid_layer_pattern), costs.sizes_of(args)
    samples, peak = args.global_batch_size, throughput.peak(args)
    return {
        "pattern": args.hybrid_layer_pattern,
        "backend": args.backend,
        "device": args.device,
        "processes": args.world_size,
        "micro_batch": args.micro_batch_size,
        "micro_batches": samples // (args.micro_batch_size * args.data_parallel_size),
        "sequence_length": args.seq_length,
        "tokens": samples * args.seq_length,
        "flops": costs.training_flops(layers, sizes, samples),
        "peak_tflops": peak.tflops if peak else None,
        "peak_name": peak.name if peak else None,
        "parameters": costs.model_parameters(layers, sizes).total,
    }


def _import(device: str) -> None:
    """What a run imports and a process can import before it has flags."""
    import torch  # noqa: F401

    if device == "cuda":  # the CPU engine is to be there before Megatron is
        from megatron_hybrid.cli import arguments

        arguments.import_megatron_quietly()
        import triton  # noqa: F401

        import megatron_hybrid.model.build
        import megatron_hybrid.training.run  # noqa: F401


def main(folder: Path, device: str) -> None:
    _import(device)
    import pretrain_hybrid

    go, starter = folder / GO, os.getppid()
    (folder / "ready").touch()
    while not go.exists():
        if os.getppid() != starter:
            return
        time.sleep(0.02)
    turn = time.perf_counter()
    job = Job(**json.loads(go.read_text()))
    pretrain_hybrid.main(job.argv, {"measure_step": Watch(job, turn, folder).hook})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
