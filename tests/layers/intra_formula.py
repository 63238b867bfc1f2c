"""The intra-layer hybrid in plain torch, as docs/design_space.md writes it: what our layer is compared with."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.kernels.ssd import ssd_recurrence
from megatron_hybrid.layers.intra.design import IntraDesign

EPS = 1e-5


def formula(
    d: IntraDesign, ours: dict[str, Any], base: float | None = None, partial: bool = False
) -> dict[str, Tensor]:
    """Output and gradients in fp64 from the weights in ``ours`` (tests/support/single.py, ``intra_layers``).

    Args:
        base: Of RoPE; None turns nothing.
        partial: Weights of ours may go unused.
    """
    w = {n: torch.tensor(t, dtype=torch.float64, requires_grad=True) for n, t in ours["weights"].items()}
    x = torch.tensor(ours["x"], dtype=torch.float64, requires_grad=True)
    rows = {part.name: part.rows for part in d.in_parts}
    parts = dict(zip(rows, (x @ w["in_proj.weight"].T).split(list(rows.values()), -1), strict=True))

    cores = {"attention": attend, "mamba": scan}
    b = [cores[kind](d, i, [parts[n] for n in d.branch_parts(i)], w, base) for i, kind in enumerate(d.branches)]
    if d.norm == "group":
        b = [rms(t, d.groups(i)) * w[f"fusion.{d.names[i]}_norm.weight"] for i, t in enumerate(b)]
    b = [t * s for t, s in zip(b, scales(d, w, parts, start(ours["depth"])), strict=True)]
    W = w["out_proj.weight"]
    if d.output == "separate":  # what is stored is W_2 for a sum and -W_2 for a difference: one function of the weights
        W1, W2 = W.split([d.width(0), d.width(1)], 1)
        y = b[0] @ W1.T + b[1] @ W2.T if d.fusion == "add" else b[0] @ W1.T - b[1] @ (-W2).T
    else:
        fused = [b[0] + b[1]] if d.fusion == "add" else [b[0] - b[1]] if d.fusion == "diff" else b
        if d.norm == "fused":
            factor = 1 - start(ours["depth"]) if d.scale == "diff-lambda" else 1
            fused = [
                factor * rms(t, d.groups(i)) * w[f"fusion.{n}_norm.weight"]
                for i, (t, n) in enumerate(zip(fused, d.out_parts, strict=True))
            ]
        y = torch.cat(fused, -1) @ W.T
    names = list(w)
    dy = torch.tensor(ours["dy"], dtype=torch.float64)
    dx, *gradients = torch.autograd.grad(y, [x, *w.values()], dy, allow_unused=partial)
    return {"y": y, "dx": dx, **{f"d {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}}


def start(depth: int) -> float:
    """lambda_init: Ye et al., arXiv:2410.05258, section 2.1."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def scales(d: IntraDesign, w: dict[str, Tensor], parts: dict[str, Tensor], lambda_init: float) -> list[Any]:
    if d.scale == "vector":
        return [w[f"fusion.{n}_scale.weight"] for n in d.names]
    if d.scale == "scalar":
        return list(w["fusion.scalars"])
    if d.scale == "gate":
        return list(torch.sigmoid(parts["gate"]).split(1, -1))
    if d.scale == "interpolate":
        alpha = torch.sigmoid(parts["gate"])
        return [1 - alpha, alpha]
    if d.scale == "diff-lambda":
        q1, k1, q2, k2 = w["fusion.lambdas"].chunk(4)
        return [1, torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + lambda_init]
    return [1, 1]


def rms(t: Tensor, groups: int) -> Tensor:
    """Over groups of channels, without a weight."""
    t = t.unflatten(-1, (groups, -1))
    return (t / (t.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2)


def attend(d: IntraDesign, i: int, qkv: list[Tensor], w: dict[str, Tensor], base: float | None) -> Tensor:
    """Causal attention, each query head with the key and value head of its group."""
    n, length = d.num_attention_heads, len(qkv[0])
    widths = (d.qk_head_dim, d.qk_head_dim, d.value_head_dim)
    q, k, v = (t.unflatten(-1, (-1, width)) for t, width in zip(qkv, widths, strict=True))
    if base:
        q, k = rotate(q, base), rotate(k, base)
    k, v = (t.repeat_interleave(n // t.shape[2], 2) for t in (k, v))
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = column <= row
    if d.window:
        seen &= (row - column < d.window) | (column < d.sinks)
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) / d.qk_head_dim**0.5
    return torch.einsum("bnij,jbnd->ibnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(-2)


def scan(d: IntraDesign, i: int, zxbcdt: list[Tensor], w: dict[str, Tensor], base: float | None) -> Tensor:
    """Mamba-2 between its projections: convolution, recurrence, gate (Dao and Gu, arXiv:2405.21060)."""
    z, x, B, C, dt = zxbcdt
    name = d.names[i]
    kernel, bias = w[f"{name}.conv1d_weight"], w[f"{name}.conv1d_bias"]
    padded = F.pad(torch.cat([x, B, C], -1).permute(1, 2, 0), (kernel.shape[-1] - 1, 0))
    mixed = F.silu(F.conv1d(padded, kernel, bias, groups=len(kernel))).transpose(1, 2)
    states = d.ssm_groups * d.state_dim
    u, B, C = mixed.split([d.ssm_dim, states, states], -1)
    y = ssd_recurrence(
        u.unflatten(-1, (d.ssm_heads, -1)),
        dt.transpose(0, 1),
        -w[f"{name}.A_log"].float().exp().double(),  # upstream hands A and dt_bias to its kernel in fp32
        B.unflatten(-1, (d.ssm_groups, -1)),
        C.unflatten(-1, (d.ssm_groups, -1)),
        D=w[f"{name}.D"],
        dt_bias=w[f"{name}.dt_bias"].float().double(),
        dt_softplus=True,
    )
    return y.transpose(0, 1).flatten(-2) * F.silu(z)


def rotate(t: Tensor, base: float) -> Tensor:
    """[s, b, n, d]: pairs (i, i + d/2) turned by position * base^(-2i/d); angles in fp32, as all models have them."""
    length, half = t.shape[0], t.shape[-1] // 2
    turns = torch.arange(length)[:, None].float() / base ** (torch.arange(half).float() / half)
    cos, sin = turns.cos().to(t.dtype)[:, None, None], turns.sin().to(t.dtype)[:, None, None]
    a, b = t[..., :half], t[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def relative_errors(ours: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of our output and each gradient, against the largest entry of what is expected."""
    got = {"y": ours["y"], "dx": ours["dx"], **{f"d {n}": g for n, g in ours["gradients"].items()}}
    errors = {}
    for name, want in expected.items():
        size = float(want.detach().abs().max()) or 1.0
        errors[name] = float(np.abs(got[name] - want.detach().numpy()).max()) / size
    return errors
