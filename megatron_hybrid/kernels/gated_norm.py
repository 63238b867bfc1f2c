"""The gated RMSNorm of Mamba-2 in plain PyTorch; on CUDA, without its gate, in Triton.

Shape letters: d channels, on this rank where ranks split them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hybrid.kernels.norms import has_kernel, rms_norm


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm over groups of channels, with an optional gate silu(z).

    Args:
        x: [..., d]; any floating-point dtype, computed in fp32 (fp64 for fp64).
        weight: [d].
        z: gate, the shape of ``x``.
        eps: added to the mean square.
        group_size: channels normalised together; None takes all d.
        norm_before_gate: norm(x) * silu(z) if true, else norm(x * silu(z)).

    Returns:
        [..., d] in the dtype of ``x``.

    Raises:
        ValueError: group_size does not divide d, or z has another shape than x.
    """
    d = x.shape[-1]
    group_size = d if group_size is None else group_size
    if group_size < 1 or d % group_size:
        raise ValueError(f"group_size is {group_size}; it must divide the {d} channels of x")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}; it must be that of x, {tuple(x.shape)}")
    if z is None and has_kernel(x, d // group_size):
        return rms_norm(x, weight, eps, d // group_size)[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(dtype))
    y = y.unflatten(-1, (-1, group_size))  # [..., d / group_size, group_size]
    y = F.rms_norm(y, (group_size,), eps=eps).flatten(-2)  # [..., d]
    y = y * weight.to(dtype)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


class GatedRMSNorm(nn.Module):
    """:func:`gated_rms_norm` as a module.

    Constructor, attributes and state dict are those of ``mamba_ssm``'s ``RMSNorm``
    (ops/triton/layernorm_gated.py), which Megatron's ``ExtendedRMSNorm`` derives from
    (core/ssm/mamba_mixer.py).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(f"group_size is {group_size}; it must divide hidden_size, {hidden_size}")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalises x [..., hidden_size], gated by z of the same shape."""
        return gated_rms_norm(x, self.weight, z, self.eps, self.group_size, self.norm_before_gate)

    def extra_repr(self) -> str:
        return (
            f"{self.weight.numel()}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
