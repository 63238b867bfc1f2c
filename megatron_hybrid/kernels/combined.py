"""The two functions of mamba_ssm that Megatron's MambaMixer calls, in plain PyTorch.

Signatures are those of ``mamba_ssm/ops/triton/ssd_combined.py``. An option that this backend lacks raises a
ValueError, and a keyword that mamba_ssm does not have raises Python's TypeError.

Shape letters: b batch, l length, h heads, p head dim, g groups, n state dim. Sizes are those of one rank.
"""

import math
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from .conv import causal_conv1d_fn
from .gated_norm import gated_rms_norm
from .ssd import ssd_chunk_scan


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`~megatron_hybrid.kernels.ssd.ssd_chunk_scan` in mamba_ssm's argument order.

    Raises:
        ValueError: as ssd_chunk_scan; or cu_seqlens or return_varlen_states is given.
    """
    if cu_seqlens is not None or return_varlen_states:
        raise ValueError(
            "cu_seqlens and return_varlen_states are not supported by the torch backend; "
            "mark documents with seq_idx, or install mamba_ssm"
        )
    return ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )


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
    """The core of a Mamba-2 layer between its projections: conv, SSD scan, gate.

    The function is long because mamba_ssm's signature has 20 parameters.

    Args:
        zxbcdt: output of the input projection, [b, l, 2 h p + 2 g n + h]: z, x, B, C, dt.
        conv1d_weight: [h p + 2 g n, width].
        conv1d_bias: [h p + 2 g n].
        dt_bias: [h]; softplus(dt + dt_bias) is the step size.
        A: [h].
        D: [h] (then ``headdim`` is needed) or [h, p].
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states: as in ssd_chunk_scan.
        activation: of the convolution, None or "silu".
        rmsnorm_weight: [h p]; if given, the gated RMSNorm (groups of h p / g channels) replaces the plain gate
            y * silu(z), with rmsnorm_eps and norm_before_gate.
        outproj_weight: [out, h p]; if given, the output projection is applied too.
        outproj_bias: [out].
        headdim: p.
        ngroups: g.

    Returns:
        y [b, l, h p] (or [b, l, out]) in the dtype of ``zxbcdt``, or ``(y, final_states)``.

    Raises:
        ValueError: headdim is missing, widths do not add up, or outproj_bias is given without outproj_weight.
    """
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias is given without outproj_weight; pass both or neither")
    h, p, g, n = _sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    z, xBC, dt = zxbcdt.split([h * p, h * p + 2 * g * n, h], dim=-1)  # [b, l, h p], [b, l, h p + 2 g n], [b, l, h]
    mixed = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation)
    x, B, C = cast(Tensor, mixed).transpose(1, 2).split([h * p, g * n, g * n], dim=-1)  # [b, l, h p], [b, l, g n] twice
    scanned = ssd_chunk_scan(
        x.unflatten(-1, (h, p)),  # [b, l, h, p]
        dt,
        A,
        B.unflatten(-1, (g, n)),  # [b, l, g, n]
        C.unflatten(-1, (g, n)),  # [b, l, g, n]
        chunk_size,
        D=D,
        z=z.unflatten(-1, (h, p)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    y, final_states = scanned if isinstance(scanned, tuple) else (scanned, None)
    y = y.flatten(-2)  # [b, l, h p]
    if rmsnorm_weight is not None:
        y = gated_rms_norm(y, rmsnorm_weight, z, rmsnorm_eps, h * p // g, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)  # [b, l, out]
    return y if final_states is None else (y, final_states)


class _Sizes(NamedTuple):
    heads: int
    head_dim: int
    groups: int
    state: int


def _sizes(zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, groups: int) -> _Sizes:
    """The sizes h, p, g and n that the widths of the arguments imply.

    Raises:
        ValueError: headdim is missing, or the widths do not add up.
    """
    heads, head_dim = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    if head_dim is None:
        raise ValueError(f"D has shape {tuple(D.shape)}; pass headdim, or D as [heads, headdim]")
    inner = heads * head_dim
    state, rest = divmod(conv1d_weight.shape[0] - inner, 2 * groups)
    if rest or state < 1 or zxbcdt.shape[-1] != 2 * inner + 2 * groups * state + heads:
        raise ValueError(
            f"zxbcdt is {zxbcdt.shape[-1]} and conv1d_weight {conv1d_weight.shape[0]} wide; "
            f"{heads} heads of {head_dim} and {groups} groups need 2 x {inner} + 2 x {groups} x "
            f"state + {heads} and {inner} + 2 x {groups} x state"
        )
    return _Sizes(heads, head_dim, groups, state)
