"""The causal depthwise convolution of Mamba-2 in plain PyTorch.

Shape letters: b batch, d channels, l length, w width of the kernel. The last tap, ``weight[:, w - 1]``, multiplies the
token itself; tap ``w - 1 - s`` multiplies the token ``s`` steps earlier. The kernel knows nothing of parallelism: its
sizes are those of one rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference: the convolution token by token, in the dtype of its inputs; slow.

    Arguments, result and errors are those of :func:`causal_conv1d_fn`.
    """
    _check_inputs(x, weight, bias, seq_idx, initial_states, activation)
    b, d, length = x.shape
    w = weight.shape[1]
    window = x.new_zeros(b, d, w - 1) if initial_states is None else initial_states
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1)
            window = torch.where(same, window, torch.zeros_like(window))
        window = torch.cat([window, x[:, :, t : t + 1]], dim=2)  # [b, d, w]
        y = (window * weight).sum(2)  # [b, d]
        ys.append(y if bias is None else y + bias)
        window = window[:, :, 1:]  # [b, d, w - 1]
    y = torch.stack(ys, dim=2)  # [b, d, l]
    if activation is not None:
        y = F.silu(y)
    return (y, window) if return_final_states else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, differentiable in x, weight, bias and initial_states.

    The signature is that of ``causal_conv1d.causal_conv1d_fn``. Products are summed in fp32 (fp64
    for fp64 ``x``). ``x`` may have any strides, and the result has the same ones: a transposed
    [b, l, d] tensor costs no copy.

    Args:
        x: [b, d, l].
        weight: [d, w].
        bias: [d].
        seq_idx: document of each token, [b, l], int; no tap reads across a change of it.
        initial_states: the w - 1 inputs before the first token, [b, d, w - 1]; with ``seq_idx``
            they belong to the first document.
        return_final_states: also return the last w - 1 inputs, [b, d, w - 1], zero where they
            belong to an earlier document than the last token.
        final_states_out: not supported; must be None.
        activation: None, "silu" or "swish" (the same thing).

    Returns:
        y [b, d, l] in the dtype of ``x``, or ``(y, final_states)``.

    Raises:
        ValueError: shapes disagree, the activation is unknown, or final_states_out is given.
    """
    if final_states_out is not None:
        raise ValueError(
            "final_states_out is not supported by the torch backend; use return_final_states=True and copy the result"
        )
    _check_inputs(x, weight, bias, seq_idx, initial_states, activation)
    doc = None if seq_idx is None else document_number(seq_idx)
    y = _CausalConv.apply(x, weight, bias, initial_states, doc, activation is not None)
    if not return_final_states:
        return y
    return y, _final_states(x, initial_states, doc, weight.shape[1])


class _CausalConv(torch.autograd.Function):
    """A sum of w shifted products; only the inputs are saved for the backward pass.

    One pass per tap over [b, d, l] tensors is as fast as ``F.conv1d`` (whose depthwise form is not optimised on
    CPUs), works in both memory layouts, and can mask taps that cross a document boundary, which ``F.conv1d`` cannot.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, initial_states, doc, activate):
        """x [b, d, l], weight [d, w], bias [d], initial_states [b, d, w - 1], doc [b, l] to [b, d, l]."""
        ctx.save_for_backward(x, weight, bias, initial_states, doc)
        ctx.activate = activate
        y = _convolve(x, weight, bias, initial_states, doc)
        return (F.silu(y, inplace=True) if activate else y).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        """dy [b, d, l] to the gradients of x, weight, bias and initial_states, in their shapes."""
        x, weight, bias, initial_states, doc = ctx.saved_tensors
        dtype = _sum_dtype(x)
        dy = dy.to(dtype)
        if ctx.activate:
            dy = torch.ops.aten.silu_backward(dy, _convolve(x, weight, bias, initial_states, doc))
        x_sum, w_sum = x.to(dtype), weight.to(dtype)
        w, length = weight.shape[1], x.shape[2]
        dx = dy * w_sum[:, -1:]  # [b, d, l]
        d_weight = torch.empty_like(w_sum)  # [d, w]
        d_weight[:, -1] = (dy * x_sum).sum((0, 2))
        d_initial = None if initial_states is None else torch.zeros_like(initial_states, dtype=dtype)
        for s in range(1, w):
            tap = w_sum[:, -1 - s, None]  # [d, 1]
            part = _masked(dy[..., s:], doc, s)  # [b, d, l - s]
            dx[..., : max(length - s, 0)].addcmul_(part, tap)
            d_tap = (part * x_sum[..., : max(length - s, 0)]).sum((0, 2))  # [d]
            if d_initial is not None:
                first = _masked_first(dy[..., :s], doc)  # tokens whose tap s reads an initial state, [b, d, min(s, l)]
                read = slice(w - 1 - s, w - 1 - s + first.shape[2])
                d_initial[..., read] += first * tap
                d_tap += (first * initial_states[..., read]).sum((0, 2))
            d_weight[:, -1 - s] = d_tap
        return (
            dx.to(x.dtype),
            d_weight.to(weight.dtype),
            None if bias is None else dy.sum((0, 2)).to(bias.dtype),
            None if d_initial is None else d_initial.to(initial_states.dtype),
            None,
            None,
        )


def _convolve(x, weight, bias, initial_states, doc) -> Tensor:
    """The convolution before its activation, [b, d, l] in fp32 (or fp64)."""
    dtype = _sum_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    w, length = weight.shape[1], x.shape[2]
    y = x * weight[:, -1:]
    if bias is not None:
        y += bias.to(dtype)[:, None]
    for s in range(1, w):
        tap = weight[:, -1 - s, None]  # [d, 1]
        y[..., s:].addcmul_(_masked(x[..., : max(length - s, 0)], doc, s), tap)
        if initial_states is not None:
            n = min(s, length)
            before = initial_states[..., w - 1 - s : w - 1 - s + n].to(dtype)  # [b, d, n]
            y[..., :s].addcmul_(_masked_first(before, doc), tap)
    return y


def _masked(part: Tensor, doc: Tensor | None, s: int) -> Tensor:
    """Zeroes entries of part [b, d, l - s] whose tokens t and t - s are in different documents."""
    if doc is None:
        return part
    return part * (doc[:, s:] == doc[:, : max(doc.shape[1] - s, 0)])[:, None]


def _masked_first(part: Tensor, doc: Tensor | None) -> Tensor:
    """Zeroes entries of part [b, d, n], the first n tokens, that are not in the first document."""
    return part if doc is None else part * (doc[:, : part.shape[2]] == 0)[:, None]


def _final_states(x, initial_states, doc, w: int) -> Tensor:
    """The last w - 1 inputs of the last document, [b, d, w - 1], with zeros or initial_states in front."""
    b, d, length = x.shape
    if initial_states is None:
        initial_states = x.new_zeros(b, d, w - 1)
    if doc is not None:
        last = doc[:, -1:]  # [b, 1]
        x = x * (doc == last)[:, None]
        initial_states = initial_states * (last == 0)[:, None]
    return torch.cat([initial_states.to(x.dtype), x[..., max(length - w + 1, 0) :]], dim=2)[..., min(length, w - 1) :]


def document_number(seq_idx: Tensor) -> Tensor:
    """Numbers runs of equal ids from 0, [b, l] to [b, l]: an id that comes back later is a new document."""
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_inputs(x, weight, bias, seq_idx, initial_states, activation) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [b, channels, l] and [channels, width]"
        )
    b, d, length = x.shape
    if length == 0:
        raise ValueError("x has length 0; pass at least one token")
    wanted = {
        "weight": (weight, (d, weight.shape[1])),
        "bias": (bias, (d,)),
        "seq_idx": (seq_idx, (b, length)),
        "initial_states": (initial_states, (b, d, weight.shape[1] - 1)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}")
