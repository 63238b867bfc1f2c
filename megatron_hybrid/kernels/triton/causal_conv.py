"""The causal depthwise convolution of Mamba-2 with its SiLU, forward and backward, in Triton.

Shape letters: b samples, s tokens, c channels, w width of the kernel, 2 to 4. Tap ``weight[:, w - 1 - k]`` multiplies
the token k steps earlier. Readable reference: :func:`megatron_hybrid.kernels.conv.causal_conv1d_reference`.

A program has a block of channels of one sample and steps through its tokens, four at a time, with the w - 1 rows before
them in registers: each row of x is read once, and w - 1 rows of its neighbour. The backward pass steps from the last
token to the first, computes the sum before the SiLU again from x, and keeps the gradients of the weights in fp32 until
its end; the sums of all programs are added by one torch sum, so that nothing depends on the order in which they run.
Sums are in fp32. Offsets of rows are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.kernels.triton.configs import launch_options
from megatron_hybrid.kernels.triton.conv_steps import (
    add_weight_gradients,
    all_joined,
    four_taps,
    gradients_of_sums,
    joined,
    row_before,
    rows,
    silu,
    weights,
    write,
    write_initial,
    write_sums,
)
from megatron_hybrid.kernels.triton.tiles import strides_in_loads

WIDTHS = (2, 3, 4)


@triton.jit
def convolution_kernel(
    x,
    weight,
    bias,
    documents,
    initial,
    out,
    length,
    channels,
    x_sample,
    x_token,
    out_sample,
    out_token,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [b, s, c] to out [b, s, c]; strides are in units of ALIGNED elements."""
    blocks = tl.cdiv(channels, CHANNELS)
    columns = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)  # [C]
    t0 = (tl.program_id(0) // blocks) * TOKENS
    sample = tl.program_id(1).to(tl.int64)
    inside = columns < channels
    x += sample * x_sample * ALIGNED
    out += sample * out_sample * ALIGNED
    documents += sample * length
    initial += sample * channels * (WIDTH - 1)
    step = x_token.to(tl.int64) * ALIGNED
    out_step = out_token.to(tl.int64) * ALIGNED

    w, b = weights(weight, bias, columns, inside, CHANNELS, WIDTH, BIAS)
    _, p3, p2, p1 = rows(x, t0 - 4, step, columns, inside, tl.maximum(t0 - WIDTH + 1, 0), length)
    if INITIAL:
        p1 += row_before(initial, t0 - 1, columns, inside, WIDTH)
        p2 += row_before(initial, t0 - 2, columns, inside, WIDTH)
        p3 += row_before(initial, t0 - 3, columns, inside, WIDTH)
    i1 = joined(documents, t0 - 1, length, DOCUMENTS)
    i2 = joined(documents, t0 - 2, length, DOCUMENTS)
    for start in tl.range(0, tl.minimum(TOKENS, length - t0), 4, num_stages=STAGES):
        t = t0 + start
        a = rows(x, t, step, columns, inside, 0, length)
        j = all_joined(documents, t, length, DOCUMENTS)
        y0, y1, y2, y3 = four_taps(w, a, (p1, p2, p3), j, (i1, i2), WIDTH, DOCUMENTS)
        y = (silu(b + y0, SILU), silu(b + y1, SILU), silu(b + y2, SILU), silu(b + y3, SILU))
        write(out, t, out_step, columns, inside, length, y)
        p1, p2, p3 = a[3], a[2], a[1]
        i1, i2 = j[3], j[2]


@triton.jit
def convolution_gradients_kernel(
    dy,
    x,
    weight,
    bias,
    documents,
    initial,
    dx,
    d_initial,
    sums,
    length,
    channels,
    dy_sample,
    dy_token,
    x_sample,
    x_token,
    dx_sample,
    dx_token,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INITIAL: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dy, x [b, s, c] to dx [b, s, c] and this program's share of the sums, [5, c] in fp32.

    Rows of the sums: gradients of the taps of 0, 1, 2 and 3 steps back, and of the bias. The function is long because
    Triton has no structures, and what a step hands to the next must be named here.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    columns = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)  # [C]
    share = tl.program_id(0) // blocks
    t0 = share * TOKENS
    sample = tl.program_id(1).to(tl.int64)
    inside = columns < channels
    dy += sample * dy_sample * ALIGNED
    x += sample * x_sample * ALIGNED
    dx += sample * dx_sample * ALIGNED
    documents += sample * length
    initial += sample * channels * (WIDTH - 1)
    dy_step = dy_token.to(tl.int64) * ALIGNED
    step = x_token.to(tl.int64) * ALIGNED
    dx_step = dx_token.to(tl.int64) * ALIGNED
    w, b = weights(weight, bias, columns, inside, CHANNELS, WIDTH, BIAS)
    first = tl.maximum(t0 - WIDTH + 1, 0)

    # The three tokens after this program's reach back into it: gradients n1 to n3, joined to their predecessors by m.
    rounds = tl.cdiv(tl.minimum(TOKENS, length - t0), 4)
    end = t0 + rounds * 4
    a0, a1, a2, a3 = rows(x, end - 4, step, columns, inside, first, length)
    after = rows(x, end, step, columns, inside, 0, tl.minimum(length, end + 3))
    j0, j1, j2, j3 = all_joined(documents, end - 4, length, DOCUMENTS)
    m = all_joined(documents, end, length, DOCUMENTS)
    n1, n2, n3, _ = gradients_of_sums(
        dy, end, dy_step, columns, inside, tl.minimum(length, end + 3),
        w, b, after, (a3, a2, a1), m, (j3, j2), SILU, WIDTH, DOCUMENTS,
    )  # fmt: skip
    m1, m2, m3, _ = m

    d0 = tl.zeros((CHANNELS,), tl.float32)
    d1 = tl.zeros((CHANNELS,), tl.float32)
    d2 = tl.zeros((CHANNELS,), tl.float32)
    d3 = tl.zeros((CHANNELS,), tl.float32)
    d_bias = tl.zeros((CHANNELS,), tl.float32)
    for back in tl.range(rounds, num_stages=STAGES):
        t = end - 4 - 4 * back
        # a0 to a3 are rows t to t + 3 of x, p0 to p3 the four before; j and q say whether their tokens are joined
        p0, p1, p2, p3 = rows(x, t - 4, step, columns, inside, first, length)
        if INITIAL:
            p1 += row_before(initial, t - 3, columns, inside, WIDTH)
            p2 += row_before(initial, t - 2, columns, inside, WIDTH)
            p3 += row_before(initial, t - 1, columns, inside, WIDTH)
        q0, q1, q2, q3 = all_joined(documents, t - 4, length, DOCUMENTS)
        a, j = (a0, a1, a2, a3), (j0, j1, j2, j3)
        g0, g1, g2, g3 = gradients_of_sums(
            dy, t, dy_step, columns, inside, length,
            w, b, a, (p3, p2, p1), j, (q3, q2), SILU, WIDTH, DOCUMENTS,
        )  # fmt: skip
        d = (d0, d1, d2, d3)
        d = add_weight_gradients(d, g0, a0, p3, p2, p1, j0, q3, q2, WIDTH, DOCUMENTS)
        d = add_weight_gradients(d, g1, a1, a0, p3, p2, j1, j0, q3, WIDTH, DOCUMENTS)
        d = add_weight_gradients(d, g2, a2, a1, a0, p3, j2, j1, j0, WIDTH, DOCUMENTS)
        d = add_weight_gradients(d, g3, a3, a2, a1, a0, j3, j2, j1, WIDTH, DOCUMENTS)
        d0, d1, d2, d3 = d
        d_bias += (g0 + g1) + (g2 + g3)
        # the same sums with time reversed
        dx3, dx2, dx1, dx0 = four_taps(w, (g3, g2, g1, g0), (n1, n2, n3), (m1, j3, j2, j1), (m2, m3), WIDTH, DOCUMENTS)
        write(dx, t, dx_step, columns, inside, length, (dx0, dx1, dx2, dx3))
        n1, n2, n3 = g0, g1, g2
        m1, m2, m3 = j0, j1, j2
        a0, a1, a2, a3 = p0, p1, p2, p3
        j0, j1, j2, j3 = q0, q1, q2, q3

    sums += (sample * tl.cdiv(length, TOKENS) + share) * (5 * channels)
    write_sums(sums, channels, columns, inside, (d0, d1, d2, d3, d_bias))
    if INITIAL:  # token 0 is joined to the inputs before it; n1 to n3 are now the gradients of tokens 0 to 2
        d_initial += sample * channels * (WIDTH - 1)
        write_initial(d_initial, columns, inside & (t0 == 0), w, (n1, n2, n3), (m1, m2, m3), WIDTH, DOCUMENTS)


def causal_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Writes the convolution of x, after its SiLU if asked for, to ``out``.

    Args:
        x: [b, s, c] in bf16, fp16 or fp32; any strides whose last is 1, as columns of a wider matrix have them.
        weight: [c, w], contiguous; w of 2, 3 or 4.
        bias: [c].
        documents: Number of each token's document, int32 [b, s], contiguous, never falling along s
            (:func:`megatron_hybrid.kernels.conv.document_number`): no tap reads across a change.
        initial_states: The w - 1 inputs before the first token, [b, c, w - 1], contiguous; they belong to its document.
        silu: Whether SiLU follows.
        out: [b, s, c], strides as for x; must not overlap x.

    Raises:
        ValueError: A shape, a stride or a width does not fit.
    """
    _check(x, weight, bias, documents, initial_states, {"x": x, "out": out})
    (b, s, c), width = x.shape, weight.shape[1]
    options = launch_options("causal_conv_forward", shape_class(x, documents))
    grid = (triton.cdiv(c, options["CHANNELS"]) * triton.cdiv(s, options["TOKENS"]), b)
    aligned, strides = strides_in_loads(x, out)
    convolution_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        x if documents is None else documents,
        x if initial_states is None else initial_states,
        out,
        s,
        c,
        *strides,
        ALIGNED=aligned,
        WIDTH=width,
        BIAS=bias is not None,
        DOCUMENTS=documents is not None,
        INITIAL=initial_states is not None,
        SILU=silu,
        **options,
    )


def causal_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    dx: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`causal_conv_forward`, whose arguments it takes; deterministic.

    Args:
        dy: Gradient of its ``out``, [b, s, c], strides as for x.
        dx: The gradient of x is written here, [b, s, c], strides as for x; must overlap neither dy nor x.

    Returns:
        Gradients of weight, fp32 [c, w], of bias, fp32 [c], and of initial_states, [b, c, w - 1] in their dtype; None
        for the last two where there is nothing to differentiate.

    Raises:
        ValueError: A shape, a stride or a width does not fit.
    """
    _check(x, weight, bias, documents, initial_states, {"x": x, "dy": dy, "dx": dx})
    (b, s, c), width = x.shape, weight.shape[1]
    options = launch_options("causal_conv_backward", shape_class(x, documents))
    shares = triton.cdiv(s, options["TOKENS"])
    sums = torch.empty(b * shares, 5, c, dtype=torch.float32, device=x.device)
    d_initial = None if initial_states is None else torch.empty_like(initial_states)
    aligned, strides = strides_in_loads(dy, x, dx)
    convolution_gradients_kernel[triton.cdiv(c, options["CHANNELS"]) * shares, b](
        dy,
        x,
        weight,
        weight if bias is None else bias,
        x if documents is None else documents,
        x if initial_states is None else initial_states,
        dx,
        x if d_initial is None else d_initial,
        sums,
        s,
        c,
        *strides,
        ALIGNED=aligned,
        WIDTH=width,
        BIAS=bias is not None,
        DOCUMENTS=documents is not None,
        INITIAL=initial_states is not None,
        SILU=silu,
        **options,
    )
    total = sums.sum(0)  # [5, c]
    d_weight = total[:width].flip(0).t()  # [c, w]
    return d_weight, None if bias is None else total[4], d_initial


def shape_class(x: Tensor, documents: Tensor | None) -> str:
    """Of the table of configurations."""
    return str(x.element_size()) + (" documents" if documents is not None else "")


def _check(x, weight, bias, documents, initial_states, rows: dict[str, Tensor]) -> None:
    """Raises ValueError unless shapes and strides are those of the functions above."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [b, s, c] and [c, w], "
            f"w one of {WIDTHS}"
        )
    b, s, c = x.shape
    if not b * s * c:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass at least one token")
    wanted = {
        "weight": (weight, (c, weight.shape[1])),
        "bias": (bias, (c,)),
        "documents": (documents, (b, s)),
        "initial_states": (initial_states, (b, c, weight.shape[1] - 1)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"with x {tuple(x.shape)} it must be {shape}, contiguous"
            )
    for name, tensor in rows.items():
        if tensor.shape != x.shape or (tensor.stride(2) != 1 and c > 1):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"it must be {tuple(x.shape)} with a last stride of 1"
            )
