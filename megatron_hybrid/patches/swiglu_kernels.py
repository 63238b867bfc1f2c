"""Patches of SwiGLU: one kernel each way, which is there at the first step; upstream's is compiled by torch then."""

from collections.abc import Callable

from torch import Tensor

from megatron_hybrid.kernels import swiglu
from megatron_hybrid.kernels.triton_use import can_run
from megatron_hybrid.patches.patching import Patch, Table

FUSIONS = "megatron.core.fusions.fused_bias_swiglu"


def _takes(y: Tensor) -> bool:
    return can_run(y) and y.dtype in swiglu.DTYPES


def swiglu_in_one_kernel(upstreams: Callable) -> Callable:
    """y [n, 2f] to [n, f]."""

    def forward(y: Tensor) -> Tensor:
        return swiglu.swiglu_forward(y, None) if _takes(y) else upstreams(y)

    return forward


def gradient_of_swiglu_in_one_kernel(upstreams: Callable) -> Callable:
    """Gradient g [n, f], and y [n, 2f], to the gradient of y."""

    def backward(g: Tensor, y: Tensor) -> Tensor:
        return swiglu.swiglu_backward(y, None, g, again=False)[0] if _takes(y) else upstreams(g, y)

    return backward


def weighted_swiglu_in_one_kernel(upstreams: Callable) -> Callable:
    """y [n, 2f] and weights [n, 1] to [n, f]."""

    def forward(y: Tensor, weights: Tensor) -> Tensor:
        return swiglu.swiglu_forward(y, weights.squeeze(-1)) if _takes(y) else upstreams(y, weights)

    return forward


def gradients_of_weighted_swiglu_in_one_kernel(upstreams: Callable) -> Callable:
    """Gradient g [n, f], y [n, 2f] and weights [n, 1] to the gradients of y and weights."""

    def backward(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if not _takes(y):
            return upstreams(g, y, weights)
        dy, dp, _ = swiglu.swiglu_backward(y, weights.squeeze(-1), g, again=False)
        assert dp is not None
        return dy, dp.unsqueeze(-1)

    return backward


def _row(name: str, make: Callable, line: int) -> Patch:
    reason = "torch compiles it in the first step of each run"
    return Patch(FUSIONS, name, make, reason, f"core/fusions/fused_bias_swiglu.py:{line}")


TABLE = Table(
    "SwiGLU",
    (
        _row("swiglu", swiglu_in_one_kernel, 16),
        _row("swiglu_back", gradient_of_swiglu_in_one_kernel, 55),
        _row("weighted_swiglu", weighted_swiglu_in_one_kernel, 45),
        _row("weighted_swiglu_back", gradients_of_weighted_swiglu_in_one_kernel, 90),
    ),
)
