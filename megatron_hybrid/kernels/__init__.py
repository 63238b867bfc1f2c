"""Kernels in plain PyTorch, and the choice between them and mamba_ssm for the Mamba layers.

Importing this package imports neither Megatron, mamba_ssm nor causal_conv1d.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

SsmBackend = Literal["mamba_ssm", "torch"]


class SsmKernels(NamedTuple):
    """The kernels of a Mamba-2 layer, with the signatures of mamba_ssm and causal_conv1d."""

    backend: SsmBackend
    split_conv1d_scan: Callable
    chunk_scan: Callable
    causal_conv1d: Callable
    gated_norm: type[torch.nn.Module]


def ssm_backend(device: torch.device | str) -> SsmBackend:
    """The implementation used on ``device``: mamba_ssm on CUDA if it is installed, else torch.

    mamba_ssm counts as installed only together with causal_conv1d, which its fused function needs.
    """
    if torch.device(device).type != "cuda":
        return "torch"
    needed = ("mamba_ssm", "causal_conv1d", "triton")
    return "mamba_ssm" if all(importlib.util.find_spec(name) for name in needed) else "torch"


def ssm_kernels(device: torch.device | str, backend: SsmBackend | None = None) -> SsmKernels:
    """The kernels for ``device``; ``backend`` overrides the choice of :func:`ssm_backend`.

    Raises:
        ValueError: the backend is unknown, or it is mamba_ssm on a device that is not CUDA.
        ImportError: mamba_ssm was chosen, but its compiled extensions do not load.
    """
    backend = ssm_backend(device) if backend is None else backend
    if backend == "torch":
        from .combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
        from .conv import causal_conv1d_fn
        from .gated_norm import GatedRMSNorm

        return SsmKernels(
            "torch",
            mamba_split_conv1d_scan_combined,
            mamba_chunk_scan_combined,
            causal_conv1d_fn,
            GatedRMSNorm,
        )
    if backend != "mamba_ssm":
        raise ValueError(f"backend is {backend!r}; it must be 'mamba_ssm' or 'torch'")
    if torch.device(device).type != "cuda":
        raise ValueError(f"backend mamba_ssm needs a CUDA device, not {device}; use 'torch'")
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
