"""What Megatron-Core 0.19.2 needs to be told or given, beside what :mod:`.cpu` answers: which tables a process needs.

On CUDA with Transformer Engine and mamba_ssm's kernels these remain: :mod:`.parsing` and :mod:`.building`, without
which hybrids do not start or are trained wrong; :mod:`.optimizer_state`, without which checkpoints are not saved,
loaded or right; :mod:`.routers`; :mod:`.experts` and :mod:`.swiglu_kernels`, for speed; and the gated delta rule of
:mod:`.missing_packages` where flash-linear-attention is missing.
"""

import importlib
import importlib.util

from megatron_hybrid import kernels
from megatron_hybrid.patches import (
    building,
    experts,
    gloo,
    missing_packages,
    optimizer_state,
    parsing,
    routers,
    swiglu_kernels,
)
from megatron_hybrid.patches.patching import install, is_installed

MAMBA_KERNELS: dict[kernels.SsmBackend, str] = {
    "triton": "this package's, in Triton (--ssm-kernels triton)",
    "mamba_ssm": "mamba_ssm's (--ssm-kernels mamba_ssm)",
    "torch": "plain PyTorch (--ssm-kernels torch)",
}


def prepare(device: str, stack: type, model: type, ssm_backend: kernels.SsmBackend | None = None) -> list[str]:
    """Makes this process ready to build and train hybrid models. A second call with the same classes changes nothing.

    Args:
        device: ``cpu`` or ``cuda``.
        stack: The class that builds the layers of a pattern.
        model: The class of the whole model.
        ssm_backend: The kernels of Mamba-2 layers; default as :func:`megatron_hybrid.kernels.ssm_backend` chooses.

    Returns:
        One line for the kernels of Mamba-2 layers, and for each thing that was replaced because a package is missing,
        to be shown to the user.

    Raises:
        RuntimeError: The process is prepared with other classes or kernels.
    """
    notes = []
    parsing.register_symbols()
    install(building.building(stack, model))
    install(routers.TABLE)
    install(experts.TABLE)
    install(swiglu_kernels.TABLE)
    install(optimizer_state.TABLE)
    chosen = ssm_backend or kernels.ssm_backend(device)
    if chosen != "mamba_ssm":
        install(missing_packages.mamba_kernels(kernels.ssm_kernels(device, chosen)))
    notes.append(f"Mamba-2 kernels: {MAMBA_KERNELS[chosen]}")
    if not has_module("fla"):
        install(missing_packages.GATED_DELTA_RULE)
    if not is_installed(missing_packages.GRADIENT_ACCUMULATION):
        linears = importlib.import_module(missing_packages.LINEARS)
        install(missing_packages.gradient_accumulation(hasattr(linears, "fused_weight_gradient_mlp_cuda")))
    if missing_packages.lacks_fused_adam():
        install(missing_packages.FUSED_ADAM)
        notes.append("Adam: plain PyTorch (neither Transformer Engine nor Apex can be imported)")
    if device == "cpu":
        install(gloo.GLOO)
    return notes


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None
