"""What a run can do at best, what it does, and the memory that it takes for it."""

import resource
from argparse import Namespace
from dataclasses import dataclass

from megatron_hybrid.costs.hardware import Precision, gpu_of_device


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at best."""

    tflops: float
    """Dense, in TFLOP/s."""
    name: str
    """Whose peak, and of what arithmetic."""


def peak(args: Namespace) -> Peak | None:
    """The peak that MFU is stated against: ``--peak-tflops``, else that of this rank's GPU; None if it is not known.

    The precision is that of the activations, with ``--fp8-format`` too: fp8 is for the linear layers of Transformer
    Engine, while attention, scans and router stay in bf16, and a bf16 run stays comparable. To state MFU against the
    fp8 peak, give it as ``--peak-tflops``.
    """
    if args.peak_tflops is not None:
        return Peak(args.peak_tflops, "--peak-tflops")
    if args.device != "cuda":
        return None
    import torch

    gpu = gpu_of_device(torch.cuda.get_device_name(args.local_rank))
    if gpu is None:
        return None
    float32: Precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    precision: Precision = "bf16" if args.bf16 else "fp16" if args.fp16 else float32
    return Peak(gpu.peak(precision) / 1e12, f"{gpu.title}, {precision} dense")


def peak_notes(args: Namespace, known: Peak | None) -> list[str]:
    """What to say at a run's start where there is no peak."""
    if known:
        return []
    what, where = "process", "on the CPU engine"
    if args.device == "cuda":
        import torch

        what, where = "GPU", f"for {torch.cuda.get_device_name(args.local_rank)!r}"
    return [f"MFU is not logged: no peak is known {where}. Give that of one {what} with --peak-tflops N."]


@dataclass(frozen=True)
class Work:
    """Work of some steps and the time it took; of a step's own time None where something else stands in it."""

    tokens: int
    flops: float
    seconds: float | None

    def rates(self, ranks: int, peak: Peak | None) -> dict[str, float | None]:
        """tokens_per_second of all ranks; of each, tflops_per_gpu and with a peak mfu."""
        if not self.seconds:
            found: dict[str, float | None] = {"tokens_per_second": None, "tflops_per_gpu": None}
            return {**found, "mfu": None} if peak else found
        tflops = self.flops / self.seconds / ranks / 1e12
        found = {"tokens_per_second": self.tokens / self.seconds, "tflops_per_gpu": tflops}
        return {**found, "mfu": tflops / peak.tflops} if peak else found


MEMORY = {"peak_memory_bytes": "peak memory", "peak_resident_bytes": "peak resident memory"}


def peak_memory() -> dict[str, int]:
    """The largest peak of all ranks since they began; every rank takes part."""
    import torch
    from megatron.training.global_vars import get_args

    if get_args().device == "cuda":
        name, size = "peak_memory_bytes", torch.cuda.max_memory_allocated()
    else:  # in KiB (Linux)
        name, size = "peak_resident_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(size, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return {name: int(largest)}


def short(rates: dict[str, float]) -> str:
    tflops = rates["tflops_per_gpu"]
    return f"{tflops:.1f}" if tflops >= 10 else f"{tflops:.3g}"
