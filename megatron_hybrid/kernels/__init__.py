"""Kernels of the layers, each with a readable reference, and the choice of those of the Mamba-2 layers.

Importing this package imports neither Megatron, Triton, mamba_ssm nor causal_conv1d.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

SsmBackend = Literal["triton", "mamba_ssm", "torch"]
SSM_BACKENDS: tuple[SsmBackend, ...] = get_args(SsmBackend)
NEEDED = {"triton": ("triton",), "mamba_ssm": ("mamba_ssm", "causal_conv1d", "triton"), "torch": ()}
"""Packages that the kernels need besides torch; mamba_ssm's fused function calls causal_conv1d."""


class SsmKernels(NamedTuple):
    """The kernels of a Mamba-2 layer; all but ``core`` with the signatures of mamba_ssm and causal_conv1d."""

    backend: SsmBackend
    split_conv1d_scan: Callable
    chunk_scan: Callable
    causal_conv1d: Callable
    gated_norm: type[torch.nn.Module]
    core: Callable | None = None
    """split_conv1d_scan in the layer's own layout, [s, b, ...], without a copy (kernels/triton/mamba.py); None where
    there is none."""


def ssm_backend(device: torch.device | str, asked: str = "auto") -> SsmBackend:
    """The kernels of Mamba-2 layers on ``device``.

    Args:
        asked: One of SSM_BACKENDS, or ``auto``: Triton's on CUDA if Triton is installed, as it is with torch for CUDA;
            else torch's.

    Raises:
        ValueError: What is asked for is unknown, needs CUDA, or needs a package that is not installed.
    """
    on_cuda = str(device).split(":")[0] == "cuda"  # torch.device takes the CPU engine's "cuda" for a CPU
    if asked == "auto":
        return "triton" if on_cuda and not _missing("triton") else "torch"
    known = [name for name in SSM_BACKENDS if name == asked]
    if not known:
        raise ValueError(f"kernels {asked!r} are unknown; choose from {', '.join(SSM_BACKENDS)}")
    if asked != "torch" and not on_cuda and not (asked == "triton" and _interpreted()):
        raise ValueError(f"{asked} needs a CUDA device, not {device}; use torch")
    if missing := _missing(asked):
        raise ValueError(f"{asked} needs {' and '.join(missing)}, not installed (requirements-gpu.txt); use triton")
    return known[0]


def ssm_kernels(device: torch.device | str, backend: SsmBackend | None = None) -> SsmKernels:
    """The kernels for ``device``; ``backend`` overrides the choice of :func:`ssm_backend`.

    The gated norm, and what training does not call, is torch's where the kernels are Triton's.

    Raises:
        ValueError: As ssm_backend, whatever is asked for.
        ImportError: mamba_ssm was chosen, but its compiled extensions do not load.
    """
    chosen = ssm_backend(device, backend or "auto")
    if chosen == "mamba_ssm":
        scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        norm = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
        conv = importlib.import_module("causal_conv1d")
        return SsmKernels(
            "mamba_ssm",
            scan.mamba_split_conv1d_scan_combined,
            scan.mamba_chunk_scan_combined,
            conv.causal_conv1d_fn,
            norm.RMSNorm,
        )
    from .combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
    from .conv import causal_conv1d_fn
    from .gated_norm import GatedRMSNorm

    rest = mamba_chunk_scan_combined, causal_conv1d_fn, GatedRMSNorm
    if chosen == "torch":
        return SsmKernels("torch", mamba_split_conv1d_scan_combined, *rest)
    from .triton import mamba, samples_first

    return SsmKernels("triton", samples_first.mamba_split_conv1d_scan_combined, *rest, mamba.mamba_split_conv_scan)


def _missing(backend: str) -> list[str]:
    return [name for name in NEEDED[backend] if not importlib.util.find_spec(name)]


def _interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
