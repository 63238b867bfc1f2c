"""The core of a Mamba-2 layer by each of the kernels that it can have: convolution, scan and gate, both passes.

Shape letters: s tokens, b samples, h heads, p head dim, g groups, n state dim, c = h p + 2 g n channels of the
convolution, W = 2 h p + 2 g n + h columns of the projection.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import ssm_kernels

CHUNK = 128
"""Of mamba_ssm's scan, as Megatron calls it (core/ssm/mamba_mixer.py:192)."""
NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")
OURS, RIVAL = "triton", "mamba_ssm"
BATCH_FIRST = f"{RIVAL}, batch first"
"""Of inputs that are [b, s, ...] already, without the copies that a layer of [s, b, ...] needs."""


@dataclass(frozen=True)
class Sizes:
    """Of one layer and one micro-batch."""

    length: int
    batch: int
    heads: int = 32
    head_dim: int = 128
    state: int = 128
    groups: int = 1
    width: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.inner + 2 * self.groups * self.state

    @property
    def columns(self) -> int:
        """Of the projection."""
        return self.inner + self.channels + self.heads

    @property
    def least_bytes(self) -> int:
        """Bytes in bf16 that a forward and a backward pass move if nothing stands in memory between their ends: the
        projection is read twice and its gradient written; the output is written and its gradient read."""
        return 2 * self.length * self.batch * (3 * self.columns + 2 * self.inner)


@dataclass(frozen=True)
class Core:
    """An implementation with its inputs, ready to be timed."""

    name: str
    call: Callable[..., Tensor]
    """Of the inputs, in the order of :data:`NAMES`."""
    inputs: tuple[Tensor, ...]
    dy: Tensor
    gradient_as_used: bool = False
    """The projection's gradient is made contiguous, as the product before it needs it."""

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        """Output and the gradients of all inputs."""
        y = self.call(*self.inputs)
        first, *others = torch.autograd.grad(y, self.inputs, self.dy)
        return y, first.contiguous() if self.gradient_as_used else first, *others


def inputs_of(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name and the output's gradient [s, b, h p], in a layer's ranges: A in (-16, -1], steps about 0.05."""
    gen = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=gen, device=device)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=gen, device=device)  # noqa: E731
    found = {
        "zxbcdt": normal(sizes.length, sizes.batch, sizes.columns).to(dtype),
        "conv_weight": (normal(sizes.channels, sizes.width) / sizes.width**0.5).to(dtype),
        "conv_bias": (0.1 * normal(sizes.channels)).to(dtype),
        "dt_bias": -3 + normal(sizes.heads),
        "A": -(1 + 15 * uniform(sizes.heads)),
        "D": normal(sizes.heads),
    }
    dy = normal(sizes.length, sizes.batch, sizes.inner).to(dtype)
    return {name: t.requires_grad_() for name, t in found.items()}, dy


def cores(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Core]:
    """What can be timed on this device: torch's operations everywhere, on CUDA also Triton's and mamba_ssm's."""
    given, dy = inputs_of(sizes, device, dtype)
    inputs = tuple(given.values())
    found = []
    if device.type == "cuda":
        found.append(Core(OURS, _triton(sizes), inputs, dy))
    if device.type == "cuda" and all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")):
        call = _split(ssm_kernels(device, "mamba_ssm").split_conv1d_scan, sizes)
        found.append(Core(RIVAL, _in_layer(call), inputs, dy, gradient_as_used=True))
        turned = given["zxbcdt"].detach().transpose(0, 1).contiguous().requires_grad_()  # [b, s, W]
        found.append(Core(BATCH_FIRST, call, (turned, *inputs[1:]), dy.transpose(0, 1).contiguous()))
    call = _split(ssm_kernels(device, "torch").split_conv1d_scan, sizes)
    found.append(Core("torch", _in_layer(call), inputs, dy, gradient_as_used=True))
    return found


def errors(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of the output and all gradients, relative to the largest entry, by implementation.

    At two chunks and some tokens; against the torch operations in fp32 on the same inputs.
    """
    small = replace(sizes, length=2 * CHUNK + 37, batch=2)
    given, dy = inputs_of(small, device, dtype)
    exact = tuple(t.detach().float().requires_grad_() for t in given.values())
    call = _in_layer(_split(ssm_kernels(device, "torch").split_conv1d_scan, small))
    wanted = Core("exact", call, exact, dy.float()).both()
    found = {}
    for core in cores(small, device, dtype):
        got = list(core.both())
        if core.name == BATCH_FIRST:
            got[:2] = [t.transpose(0, 1) for t in got[:2]]
        found[core.name] = max(
            ((g.float() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, wanted, strict=True)
        )
    return found


def _triton(sizes: Sizes) -> Callable[..., Tensor]:
    from megatron_hybrid.kernels.triton.mamba import mamba_split_conv_scan

    def call(zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
        found = mamba_split_conv_scan(zxbcdt, weight, bias, dt_bias, A, D, sizes.head_dim, sizes.groups)
        assert isinstance(found, Tensor)  # no states are asked for
        return found

    return call


def _split(function: Callable[..., Any], sizes: Sizes) -> Callable[..., Tensor]:
    """mamba_ssm's function, or one of its signature: of [b, s, W], as Megatron's mixer calls it."""

    def call(zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
        return function(
            zxbcdt, weight, bias, dt_bias, A, D=D, chunk_size=CHUNK, activation="silu", headdim=sizes.head_dim,
            ngroups=sizes.groups, norm_before_gate=False,
        )  # fmt: skip

    return call


def _in_layer(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of [b, s, W] in a layer of [s, b, W], as Megatron's mixer has it: a copy on the way in and out."""

    def turned(zxbcdt: Tensor, *others: Tensor) -> Tensor:
        return call(zxbcdt.transpose(0, 1).contiguous(), *others).transpose(0, 1).contiguous()

    return turned
