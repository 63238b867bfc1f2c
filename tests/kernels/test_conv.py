"""The causal convolution against the token-by-token reference in float64."""

import pytest
import torch
from torch.nn import functional as F

from megatron_hybrid.kernels.conv import causal_conv1d_fn, causal_conv1d_reference

# Relative to the largest entry. fp32: sums of up to 2 x 257 terms; bf16: sums are fp32, the result
# is rounded to 2^-8 (half a unit in the last place), dx twice: the final state adds its gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def make_inputs(b, d, length, width, dtype):
    gen = torch.Generator().manual_seed(length)
    shapes = {
        "x": (b, d, length),
        "weight": (d, width),
        "bias": (d,),
        "initial_states": (b, d, width - 1),
    }
    return {k: torch.randn(*s, generator=gen).to(dtype).requires_grad_() for k, s in shapes.items()}


def outputs_and_gradients(conv, inputs, dtype=None, **options):
    if dtype is not None:
        inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    outputs = conv(**inputs, return_final_states=True, **options)
    gen = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=gen).bfloat16().to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tuple(inputs.values()), grads)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 257])
def test_outputs_and_all_gradients(length, width, dtype, packed):
    inputs = make_inputs(2, 6, length, width, dtype)
    ids = (torch.arange(length) * 5 // length).expand(2, -1).int() if packed else None
    options = {"seq_idx": ids, "activation": "silu"}
    wanted = outputs_and_gradients(causal_conv1d_reference, inputs, torch.float64, **options)
    got = outputs_and_gradients(causal_conv1d_fn, inputs, **options)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == dtype
        if w.numel():
            error = (g.double() - w).abs().max() / w.abs().max().clamp(min=1e-30)
            assert error <= TOLERANCE[dtype]


def test_equals_conv1d_of_torch():
    x, weight, bias, _ = make_inputs(2, 6, 50, 4, torch.float64).values()
    wanted = F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias), wanted, rtol=0, atol=1e-14)


def test_no_tap_crosses_a_document():
    x, weight, bias, _ = make_inputs(1, 6, 20, 4, torch.float64).values()
    ids = torch.tensor([[7] * 9 + [3] * 1 + [7] * 10])
    y, state = causal_conv1d_fn(x, weight, bias, seq_idx=ids, return_final_states=True)
    alone = [causal_conv1d_fn(part, weight, bias) for part in x.split([9, 1, 10], dim=2)]
    torch.testing.assert_close(y, torch.cat(alone, 2), rtol=0, atol=1e-14)
    assert torch.equal(state, x[..., -3:])
    (dx,) = torch.autograd.grad(y[..., 9:].sum(), x)
    assert dx[..., :9].count_nonzero() == 0 and dx[..., 9:].all()


def test_final_state_continues_the_sequence_and_keeps_the_layout():
    inputs = make_inputs(2, 6, 30, 4, torch.float64)
    x, weight, bias, initial = (t.detach() for t in inputs.values())
    whole = causal_conv1d_fn(x, weight, bias, initial_states=initial)
    parts, state = [], initial
    for part in x.split([1, 1, 28], dim=2):
        part = part.transpose(1, 2).contiguous().transpose(1, 2)
        y, state = causal_conv1d_fn(part, weight, bias, initial_states=state, return_final_states=True)
        assert y.shape[2] == 1 or y.stride(1) == 1
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-14)


def test_mistakes_are_named():
    x, weight = torch.zeros(1, 4, 8), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv1d_fn(x, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="final_states_out"):
        causal_conv1d_fn(x, weight, final_states_out=x)
