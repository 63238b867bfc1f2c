"""The core of a Mamba-2 layer between its projections on CUDA, in the layer's own layout [s, b, ...]: convolution, scan
and gate.

The backward pass keeps nothing but its inputs: it computes the convolution and the states again. The gradient of the
projection is written into one tensor by the kernels, which is that of the whole projection where the input is a part of
its columns (``kernels/columns.py``): no tensor of the layer's width is copied, split or concatenated.
``kernels/combined.py`` has the same in plain PyTorch.

Shape letters: s tokens, b samples, h heads, p head dim, g groups, n state dim, c = h p + 2 g n channels of the
convolution, w its width. Sizes are those of one rank.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.kernels.columns import GradientPlace
from megatron_hybrid.kernels.conv import document_number
from megatron_hybrid.kernels.triton import ssd_scan as scan
from megatron_hybrid.kernels.triton.causal_conv import causal_conv_backward, causal_conv_forward


def mamba_split_conv_scan(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    head_dim: int,
    groups: int,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = SSD(silu(conv(x B C)), softplus(dt + dt_bias)) silu(z), differentiable in every floating-point argument.

    Args:
        zxbcdt: Output of the input projection, [s, b, 2 h p + 2 g n + h]: z, x, B, C, dt; bf16, fp16 or fp32. Any
            strides whose last is 1.
        conv_weight: [c, w].
        conv_bias: [c].
        dt_bias: [h].
        A: [h], negative.
        D: [h], or [h p] for a weight of each channel.
        seq_idx: Document of each token, [b, s], int; convolution and state restart where it changes.
        initial_states: State before the first token, [b, h, p, n], of the first document.
        dt_limit: Range that step sizes are clamped to.
        return_final_states: Also return the state after the last token, [b, h, p, n] fp32.

    Returns:
        y [s, b, h p] in the dtype of zxbcdt, or ``(y, final_states)``.

    Raises:
        ValueError: Widths that do not add up, or a dtype or strides that the kernels do not take.
    """
    inner = A.shape[0] * head_dim
    states, rest = divmod(conv_weight.shape[0] - inner, 2 * groups)
    width = inner + conv_weight.shape[0] + A.shape[0]
    if rest or states < 1 or zxbcdt.shape[-1] != width or A.shape[0] % groups:
        raise ValueError(
            f"the projection is {zxbcdt.shape[-1]} and the convolution {conv_weight.shape[0]} channels wide; "
            f"{A.shape[0]} heads of {head_dim} and {groups} groups need {inner} + 2 x {groups} x d_state channels in "
            f"the convolution, {inner} + {A.shape[0]} more in the projection, and a multiple of {groups} heads"
        )
    if D.numel() == A.shape[0]:
        D = D.repeat_interleave(head_dim)  # [h p]
    documents = None if seq_idx is None else document_number(seq_idx).int().contiguous()  # [b, s]
    y, final = _Core.apply(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, initial_states, documents, GradientPlace(zxbcdt),
        (head_dim, groups), dt_limit, return_final_states,
    )  # fmt: skip
    return (y, final) if return_final_states else y


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, zxbcdt: Tensor, weight: Tensor, bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
        initial_states: Tensor | None, documents: Tensor | None, place: GradientPlace, sizes: tuple[int, int],
        dt_limit: tuple[float, float], want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        s, b, _ = zxbcdt.shape
        weight = weight.contiguous()
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, A, D, initial_states, documents)
        ctx.sizes, ctx.dt_limit, ctx.place = sizes, dt_limit, place
        convolved = _convolve(zxbcdt, weight, bias, documents, A.shape[0] * sizes[0])
        y = zxbcdt.new_empty(s, b, A.shape[0] * sizes[0])
        inputs = _inputs(zxbcdt, convolved, dt_bias, A, D, initial_states, documents, sizes, dt_limit)
        return y, scan.forward(inputs, y.transpose(0, 1), want_final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        zxbcdt, weight, bias, dt_bias, A, D, initial_states, documents = ctx.saved_tensors
        inner = A.shape[0] * ctx.sizes[0]
        convolved = _convolve(zxbcdt, weight, bias, documents, inner)
        inputs = _inputs(zxbcdt, convolved, dt_bias, A, D, initial_states, documents, ctx.sizes, ctx.dt_limit)
        d_zxbcdt = ctx.place.make()  # [s, b, z x B C dt]
        d_convolved = torch.empty_like(convolved)
        to = _inputs(d_zxbcdt, d_convolved, dt_bias, A, D, None, None, ctx.sizes, ctx.dt_limit)
        if d_y.stride(-1) != 1:
            d_y = d_y.contiguous()
        if d_final is not None:
            d_final = d_final.contiguous()
        d_A, d_dt_bias, d_D, d_initial = scan.backward(
            inputs, d_y.transpose(0, 1), scan.Gradients(to.x, to.z, to.B, to.C, to.raw_steps), d_final
        )
        d_weight, d_bias, _ = causal_conv_backward(
            d_convolved.transpose(0, 1), _channels(zxbcdt, inner, weight), weight, bias, documents, None, True,
            _channels(d_zxbcdt, inner, weight),
        )  # fmt: skip
        like = lambda d, t: None if d is None else d.to(t.dtype)  # noqa: E731
        return (
            d_zxbcdt, like(d_weight, weight), like(d_bias, bias), like(d_dt_bias, dt_bias), like(d_A, A), like(d_D, D),
            like(d_initial, initial_states), None, None, None, None, None,
        )  # fmt: skip


def _channels(zxbcdt: Tensor, inner: int, weight: Tensor) -> Tensor:
    """The columns x, B and C of [s, b, z x B C dt], as [b, s, c]."""
    return zxbcdt[..., inner : inner + weight.shape[0]].transpose(0, 1)


def _convolve(zxbcdt: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, inner: int) -> Tensor:
    """[s, b, z x B C dt] to the convolved channels, [s, b, c]."""
    out = zxbcdt.new_empty(*zxbcdt.shape[:2], weight.shape[0])
    causal_conv_forward(_channels(zxbcdt, inner, weight), weight, bias, documents, None, True, out.transpose(0, 1))
    return out


def _inputs(
    zxbcdt: Tensor, convolved: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, initial_states: Tensor | None,
    documents: Tensor | None, sizes: tuple[int, int], dt_limit: tuple[float, float],
) -> scan.Scan:  # fmt: skip
    """Views of both tensors as the scan takes them, [b, s, ...]; the same places of their gradients."""
    head_dim, groups = sizes
    inner = A.shape[0] * head_dim
    states = (convolved.shape[-1] - inner) // 2
    x, B, C = convolved.transpose(0, 1).split([inner, states, states], -1)  # [b, s, h p], [b, s, g n] twice
    z, _, raw_steps = zxbcdt.transpose(0, 1).split([inner, convolved.shape[-1], A.shape[0]], -1)
    first = None if initial_states is None else initial_states.float().contiguous()
    dt_bias, A, D = (t.float().contiguous() for t in (dt_bias, A, D))
    return scan.Scan(
        x, z, B, C, raw_steps, dt_bias, A, D, documents, first, head_dim, groups, limits=dt_limit,
    )  # fmt: skip
