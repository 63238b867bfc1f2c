"""The core of a Mamba-2 layer with mamba_ssm's signature, on our Triton kernels.

For callers whose tensors have samples first, such as upstream's mixer (core/ssm/mamba_mixer.py:727), which copies its
projection into that layout; our own layers call :func:`megatron_hybrid.kernels.triton.mamba.mamba_split_conv_scan`.
"""

import math

from torch import Tensor

from megatron_hybrid.kernels.triton.mamba import mamba_split_conv_scan


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments and results of :func:`megatron_hybrid.kernels.combined.mamba_split_conv1d_scan_combined`.

    ``chunk_size`` is taken for the chunk's length that was asked for, and is the kernels' own.

    Raises:
        ValueError: headdim is missing; a norm, an output projection or no activation is asked for; or as
            mamba_split_conv_scan.
    """
    if rmsnorm_weight is not None or outproj_weight is not None or outproj_bias is not None:
        raise ValueError(
            "rmsnorm_weight, outproj_weight and outproj_bias are not supported by the Triton kernels: apply the norm "
            "and the projection to the result"
        )
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation is {activation!r}; the Triton kernels have 'silu' alone")
    head_dim = headdim if D.dim() == 1 else D.shape[1]
    if head_dim is None:
        raise ValueError(f"D has shape {tuple(D.shape)}; pass headdim, or D as [heads, headdim]")
    found = mamba_split_conv_scan(
        zxbcdt.transpose(0, 1),  # [s, b, z x B C dt]
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D.flatten(),
        head_dim,
        ngroups,
        seq_idx,
        initial_states,
        dt_limit,
        return_final_states,
    )
    if isinstance(found, tuple):
        return found[0].transpose(0, 1), found[1]
    return found.transpose(0, 1)  # [b, s, h p]
