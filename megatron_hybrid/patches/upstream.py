"""What Megatron-Core 0.19.2 needs to be told or given, beside what :mod:`.cpu` answers: which tables a process needs.

On CUDA with Transformer Engine and mamba_ssm these remain: :mod:`.parsing` and :mod:`.building`, without which hybrids
do not start or are trained wrong; :mod:`.optimizer_state`, without which checkpoints are not saved, loaded or right;
:mod:`.routers`; and the gated delta rule of :mod:`.missing_packages` where flash-linear-attention is missing.
"""

import importlib
import importlib.util

from megatron_hybrid import kernels
from megatron_hybrid.patches import building, gloo, missing_packages, optimizer_state, parsing, routers
from megatron_hybrid.patches.patching import install, is_installed


def prepare(device: str, stack: type) -> list[str]:
    """Makes this process ready to build and train hybrid models. A second call with the same stack changes nothing.

    Args:
        device: ``cpu`` or ``cuda``.
        stack: The class that builds the layers of a pattern.

    Returns:
        One line for each thing that was replaced because a package is missing, to be shown to the user.

    Raises:
        RuntimeError: The process is prepared with another stack.
    """
    notes = []
    parsing.register_symbols()
    install(building.building(stack))
    install(routers.TABLE)
    install(optimizer_state.TABLE)
    if kernels.ssm_backend(device) == "torch":
        install(missing_packages.mamba_kernels())
        notes.append("Mamba-2 kernels: plain PyTorch (mamba_ssm is not in use)")
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
