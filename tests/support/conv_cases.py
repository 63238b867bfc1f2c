"""The Triton convolution beside its reference in float64, on any device: outputs and every gradient."""

import torch
from torch import Tensor

from megatron_hybrid.kernels.conv import causal_conv1d_reference, document_number
from megatron_hybrid.kernels.triton.causal_conv import causal_conv_backward, causal_conv_forward

# Relative to the largest entry. fp32: sums of up to 4 terms for outputs and of as many as there are tokens for weights.
# bf16: sums are fp32 and rounded once, to 2^-9; gradients of weights stay fp32, d_initial and dx are rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
NAMES = ("y", "dx", "d_weight", "d_bias", "d_initial")


def columns(tensor: Tensor, before: int = 8, after: int = 24) -> Tensor:
    """[b, s, c] as columns of a projection [s, b, before + c + after], as the layer has it; other columns are NaN."""
    b, s, c = tensor.shape
    wide = torch.full((s, b, before + c + after), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[:, :, before : before + c].transpose(0, 1)  # [b, s, c]
    return view.copy_(tensor)


def rounded(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers that both dtypes hold exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def documents(b: int, s: int, chance: float) -> Tensor:
    """Documents of random lengths: ids [b, s], of which some come back later."""
    starts = torch.rand(b, s, generator=torch.Generator().manual_seed(s)) < chance
    return starts.cumsum(1) % 3


def results(b, s, c, width, dtype, *, device="cpu", bias=True, initial=False, chance=0.0, silu=True):
    """Ours and the reference's y, dx, d_weight, d_bias and d_initial (those that there are)."""
    made = {
        "x": rounded(b, s, c, dtype=dtype, seed=0),
        "weight": rounded(c, width, dtype=dtype, seed=1) / 2,
        "bias": rounded(c, dtype=dtype, seed=2) if bias else None,
        "initial": rounded(b, c, width - 1, dtype=dtype, seed=3) if initial else None,
    }
    dy = rounded(b, s, c, dtype=dtype, seed=4)
    ids = documents(b, s, chance) if chance else None
    return _ours(made, dy, ids, silu, device), _reference(made, dy, ids, silu)


def _ours(made: dict, dy: Tensor, ids: Tensor | None, silu: bool, device: str) -> dict[str, Tensor]:
    x, weight, bias, initial = (None if t is None else t.to(device) for t in made.values())
    numbers = None if ids is None else document_number(ids).int().to(device)
    x, dy = columns(x), columns(dy.to(device), 16, 0)
    y, dx = columns(torch.zeros_like(x), 0, 16), columns(torch.zeros_like(x))
    causal_conv_forward(x, weight, bias, numbers, initial, silu, y)
    gradients = causal_conv_backward(dy, x, weight, bias, numbers, initial, silu, dx)
    for wide in (y, dx):  # a column beside them was written
        beside = wide._base.isnan().sum().item()
        assert beside == wide._base.numel() - wide.numel()
    return {n: t.cpu() for n, t in zip(NAMES, (y, dx, *gradients), strict=True) if t is not None}


def _reference(made: dict, dy: Tensor, ids: Tensor | None, silu: bool) -> dict[str, Tensor]:
    exact = {n: t.double().requires_grad_() for n, t in made.items() if t is not None}
    y = causal_conv1d_reference(
        exact["x"].transpose(1, 2),
        exact["weight"],
        exact.get("bias"),
        ids,
        exact.get("initial"),
        activation="silu" if silu else None,
    ).transpose(1, 2)
    gradients = torch.autograd.grad(y, tuple(exact.values()), dy.double())
    names = {"x": "dx", "weight": "d_weight", "bias": "d_bias", "initial": "d_initial"}
    return {"y": y.detach(), **{names[n]: g for n, g in zip(exact, gradients, strict=True)}}


def errors(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each, against the largest entry of what is wanted; shapes and names must agree."""
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in wanted.items()}
    return {
        n: float((ours[n].double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
        for n, want in wanted.items()
    }
