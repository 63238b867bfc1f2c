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

WIDTHS = (2, 3, 4)


@triton.jit
def _row(base, t, step, columns, inside, first, end):
    """Row t of a [tokens, channels] matrix in fp32, [C]; zeros if t is not in [first, end)."""
    at = base + t.to(tl.int64) * step + columns
    return tl.load(at, mask=inside & (t >= first) & (t < end), other=0.0).to(tl.float32)


@triton.jit
def _rows(base, t, step, columns, inside, first, end):
    """Rows t to t + 3, four times [C]."""
    a0 = _row(base, t, step, columns, inside, first, end)
    a1 = _row(base, t + 1, step, columns, inside, first, end)
    a2 = _row(base, t + 2, step, columns, inside, first, end)
    a3 = _row(base, t + 3, step, columns, inside, first, end)
    return a0, a1, a2, a3


@triton.jit
def _write(base, t, step, columns, inside, end, rows):
    """Writes rows t to t + 3, four times [C], of which those from ``end`` on do not exist."""
    for i in tl.static_range(4):
        at = base + (t + i).to(tl.int64) * step + columns
        tl.store(at, rows[i].to(base.dtype.element_ty), mask=inside & (t + i < end))


@triton.jit
def _row_before(initial, t, columns, inside, WIDTH: tl.constexpr):
    """Row t < 0 of the inputs before the first token, initial [channels, w - 1]; zeros for other t, [C]."""
    known = (t < 0) & (t > -WIDTH)
    return tl.load(initial + columns * (WIDTH - 1) + (WIDTH - 1 + t), mask=inside & known, other=0.0).to(tl.float32)


@triton.jit
def _joined(documents, t, end, DOCUMENTS: tl.constexpr):
    """Whether token t is in the document of token t - 1; true before the first and after the last token."""
    if DOCUMENTS:
        known = (t > 0) & (t < end)
        return tl.load(documents + t, mask=known, other=0) == tl.load(documents + t - 1, mask=known, other=0)
    else:
        return t == t


@triton.jit
def _all_joined(documents, t, end, DOCUMENTS: tl.constexpr):
    """_joined of tokens t to t + 3."""
    j0 = _joined(documents, t, end, DOCUMENTS)
    j1 = _joined(documents, t + 1, end, DOCUMENTS)
    j2 = _joined(documents, t + 2, end, DOCUMENTS)
    j3 = _joined(documents, t + 3, end, DOCUMENTS)
    return j0, j1, j2, j3


@triton.jit
def _only(condition, value, DOCUMENTS: tl.constexpr):
    if DOCUMENTS:
        return tl.where(condition, value, 0.0)
    else:
        return value


@triton.jit
def _taps(w, r0, r1, r2, r3, j1, j2, j3, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Sum of w_k r_k, [C], where r_k is a row k steps away and j_k says whether no document ends on step k."""
    total = w[1] * r1
    if WIDTH > 2:
        further = w[2] * r2
        if WIDTH > 3:
            further += _only(j3, w[3] * r3, DOCUMENTS)
        total += _only(j2, further, DOCUMENTS)
    return w[0] * r0 + _only(j1, total, DOCUMENTS)


@triton.jit
def _four_taps(w, a, p, j, i, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """_taps of the rows a, four times [C], each a step after the one before it; three rows p precede, the last first.

    j and i say of each row of a, and of the first two of p, whether its token is in the document of the one before it.
    """
    y0 = _taps(w, a[0], p[0], p[1], p[2], j[0], i[0], i[1], WIDTH, DOCUMENTS)
    y1 = _taps(w, a[1], a[0], p[0], p[1], j[1], j[0], i[0], WIDTH, DOCUMENTS)
    y2 = _taps(w, a[2], a[1], a[0], p[0], j[2], j[1], j[0], WIDTH, DOCUMENTS)
    y3 = _taps(w, a[3], a[2], a[1], a[0], j[3], j[2], j[1], WIDTH, DOCUMENTS)
    return y0, y1, y2, y3


@triton.jit
def _weights(weight, bias, columns, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """Taps of 0, 1, 2 and 3 steps back, [C] each, zeros for those that are not; and the bias, [C]."""
    tap = tl.arange(0, 4)[None, :] - (4 - WIDTH)  # [1, 4]
    at = weight + columns[:, None] * WIDTH + tap
    taps = tl.load(at, mask=inside[:, None] & (tap >= 0), other=0.0).to(tl.float32)  # [C, 4]
    even, odd = tl.split(tl.reshape(taps, (CHANNELS, 2, 2)))  # [C, 2]: taps 3, 1 and taps 2, 0
    w3, w1 = tl.split(even)
    w2, w0 = tl.split(odd)
    b = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return (w0, w1, w2, w3), b


@triton.jit
def _silu(y, SILU: tl.constexpr):
    if SILU:
        return y / (1.0 + tl.exp(-y))
    else:
        return y


@triton.jit
def _silu_gradient(dy, y, SILU: tl.constexpr):
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-y))
        return dy * sigmoid * (1.0 + y * (1.0 - sigmoid))
    else:
        return dy


@triton.jit
def _forward(
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

    w, b = _weights(weight, bias, columns, inside, CHANNELS, WIDTH, BIAS)
    _, p3, p2, p1 = _rows(x, t0 - 4, step, columns, inside, tl.maximum(t0 - WIDTH + 1, 0), length)
    if INITIAL:
        p1 += _row_before(initial, t0 - 1, columns, inside, WIDTH)
        p2 += _row_before(initial, t0 - 2, columns, inside, WIDTH)
        p3 += _row_before(initial, t0 - 3, columns, inside, WIDTH)
    i1 = _joined(documents, t0 - 1, length, DOCUMENTS)
    i2 = _joined(documents, t0 - 2, length, DOCUMENTS)
    for start in tl.range(0, tl.minimum(TOKENS, length - t0), 4, num_stages=STAGES):
        t = t0 + start
        a = _rows(x, t, step, columns, inside, 0, length)
        j = _all_joined(documents, t, length, DOCUMENTS)
        y0, y1, y2, y3 = _four_taps(w, a, (p1, p2, p3), j, (i1, i2), WIDTH, DOCUMENTS)
        y = (_silu(b + y0, SILU), _silu(b + y1, SILU), _silu(b + y2, SILU), _silu(b + y3, SILU))
        _write(out, t, out_step, columns, inside, length, y)
        p1, p2, p3 = a[3], a[2], a[1]
        i1, i2 = j[3], j[2]


@triton.jit
def _add_weight_gradients(d, g, r0, r1, r2, r3, j1, j2, j3, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr):
    """What a token's gradient g [C] gives to the gradients of the taps, added to d; arguments as for _taps."""
    d0, d1, d2, d3 = d
    d0 += g * r0
    d1 += _only(j1, g * r1, DOCUMENTS)
    if WIDTH > 2:
        d2 += _only(j1 & j2, g * r2, DOCUMENTS)
    if WIDTH > 3:
        d3 += _only(j1 & j2 & j3, g * r3, DOCUMENTS)
    return d0, d1, d2, d3


@triton.jit
def _gradients_of_sums(
    dy, t, step, columns, inside, end, w, b, a, p, j, i, SILU: tl.constexpr, WIDTH: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Gradients before the activation of tokens t to t + 3, four times [C], zeros from ``end`` on; a to i as above."""
    g = _rows(dy, t, step, columns, inside, 0, end)
    y = _four_taps(w, a, p, j, i, WIDTH, DOCUMENTS)
    g0, g1 = _silu_gradient(g[0], b + y[0], SILU), _silu_gradient(g[1], b + y[1], SILU)
    g2, g3 = _silu_gradient(g[2], b + y[2], SILU), _silu_gradient(g[3], b + y[3], SILU)
    return g0, g1, g2, g3


@triton.jit
def _backward(
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
    w, b = _weights(weight, bias, columns, inside, CHANNELS, WIDTH, BIAS)
    first = tl.maximum(t0 - WIDTH + 1, 0)

    # The three tokens after this program's reach back into it: gradients n1 to n3, joined to their predecessors by m.
    rounds = tl.cdiv(tl.minimum(TOKENS, length - t0), 4)
    end = t0 + rounds * 4
    a0, a1, a2, a3 = _rows(x, end - 4, step, columns, inside, first, length)
    after = _rows(x, end, step, columns, inside, 0, tl.minimum(length, end + 3))
    j0, j1, j2, j3 = _all_joined(documents, end - 4, length, DOCUMENTS)
    m = _all_joined(documents, end, length, DOCUMENTS)
    n1, n2, n3, _ = _gradients_of_sums(
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
        p0, p1, p2, p3 = _rows(x, t - 4, step, columns, inside, first, length)
        if INITIAL:
            p1 += _row_before(initial, t - 3, columns, inside, WIDTH)
            p2 += _row_before(initial, t - 2, columns, inside, WIDTH)
            p3 += _row_before(initial, t - 1, columns, inside, WIDTH)
        q0, q1, q2, q3 = _all_joined(documents, t - 4, length, DOCUMENTS)
        a, j = (a0, a1, a2, a3), (j0, j1, j2, j3)
        g0, g1, g2, g3 = _gradients_of_sums(
            dy, t, dy_step, columns, inside, length,
            w, b, a, (p3, p2, p1), j, (q3, q2), SILU, WIDTH, DOCUMENTS,
        )  # fmt: skip
        d = (d0, d1, d2, d3)
        d = _add_weight_gradients(d, g0, a0, p3, p2, p1, j0, q3, q2, WIDTH, DOCUMENTS)
        d = _add_weight_gradients(d, g1, a1, a0, p3, p2, j1, j0, q3, WIDTH, DOCUMENTS)
        d = _add_weight_gradients(d, g2, a2, a1, a0, p3, j2, j1, j0, WIDTH, DOCUMENTS)
        d = _add_weight_gradients(d, g3, a3, a2, a1, a0, j3, j2, j1, WIDTH, DOCUMENTS)
        d0, d1, d2, d3 = d
        d_bias += (g0 + g1) + (g2 + g3)
        # the same sums with time reversed
        dx3, dx2, dx1, dx0 = _four_taps(
            w, (g3, g2, g1, g0), (n1, n2, n3), (m1, j3, j2, j1), (m2, m3), WIDTH, DOCUMENTS
        )
        _write(dx, t, dx_step, columns, inside, length, (dx0, dx1, dx2, dx3))
        n1, n2, n3 = g0, g1, g2
        m1, m2, m3 = j0, j1, j2
        a0, a1, a2, a3 = p0, p1, p2, p3
        j0, j1, j2, j3 = q0, q1, q2, q3

    at = sums + (sample * tl.cdiv(length, TOKENS) + share) * (5 * channels) + columns
    tl.store(at, d0, mask=inside)
    tl.store(at + channels, d1, mask=inside)
    tl.store(at + 2 * channels, d2, mask=inside)
    tl.store(at + 3 * channels, d3, mask=inside)
    tl.store(at + 4 * channels, d_bias, mask=inside)
    if INITIAL:  # rows -1, -2 and -3 of dx, which token 0 joins; n1, n2 and n3 are now the gradients of tokens 0, 1, 2
        zero = tl.zeros((CHANNELS,), tl.float32)
        at = d_initial + sample * channels * (WIDTH - 1) + columns * (WIDTH - 1) + (WIDTH - 1)
        row1 = _taps(w, zero, n1, n2, n3, m1, m2, m3, WIDTH, DOCUMENTS)
        row2 = _taps(w, zero, zero, n1, n2, m1, m1, m2, WIDTH, DOCUMENTS)
        row3 = _taps(w, zero, zero, zero, n1, m1, m1, m1, WIDTH, DOCUMENTS)
        tl.store(at - 1, row1, mask=inside & (t0 == 0))
        tl.store(at - 2, row2, mask=inside & (t0 == 0) & (WIDTH > 2))
        tl.store(at - 3, row3, mask=inside & (t0 == 0) & (WIDTH > 3))


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
    options = launch_options("causal_conv_forward", str(x.element_size()))
    grid = (triton.cdiv(c, options["CHANNELS"]) * triton.cdiv(s, options["TOKENS"]), b)
    aligned = _alignment(x, out)
    strides = [n // aligned for t in (x, out) for n in t.stride()[:2]]
    _forward[grid](
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
    options = launch_options("causal_conv_backward", str(x.element_size()))
    shares = triton.cdiv(s, options["TOKENS"])
    sums = torch.empty(b * shares, 5, c, dtype=torch.float32, device=x.device)
    d_initial = None if initial_states is None else torch.empty_like(initial_states)
    aligned = _alignment(dy, x, dx)
    strides = [n // aligned for t in (dy, x, dx) for n in t.stride()[:2]]
    _backward[triton.cdiv(c, options["CHANNELS"]) * shares, b](
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


def _alignment(*tensors: Tensor) -> int:
    """Elements, up to 16 bytes, of which the strides of all tensors are multiples: what one load may take."""
    most = 16 // max(t.element_size() for t in tensors)
    strides = [n for t in tensors for n in t.stride()[:2]]
    return next(n for n in (most, most // 2, most // 4, 1) if n and all(stride % n == 0 for stride in strides))


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
