"""SwiGLU times a factor by Triton's interpreter, against torch's operations in float64."""

import pytest
import torch

from megatron_hybrid.kernels.swiglu import swiglu
from megatron_hybrid.kernels.triton import weighted_swiglu

pytestmark = pytest.mark.triton_interpreter


def relative(ours, wanted):
    return ((ours.double() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("weighted", [True, False])
# fp32 throughout; rounded once at the end, to 8 bits in bf16
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 24), (33, 1030), (3, 2048)])
def test_output_and_gradients(rows, width, dtype, bound, weighted):
    torch.manual_seed(0)
    y, g = 3 * torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    p = torch.rand(rows) if weighted else None
    exact_y, exact_p = y.double().requires_grad_(), torch.ones(rows).double() if p is None else p.double()
    exact_p.requires_grad_()
    gate, value = exact_y.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * value * exact_p[:, None]
    wanted.backward(g.double())
    dy, dp, again = weighted_swiglu.backward(y, p, g)
    ours = weighted_swiglu.forward(y, p)
    assert relative(ours, wanted) < bound
    assert torch.equal(again, ours)
    assert relative(dy, exact_y.grad) < bound
    assert (dp is None) is not weighted
    if weighted:
        assert dp.dtype == torch.float32 and relative(dp, exact_p.grad) < 2e-6


@pytest.mark.parametrize("weighted", [True, False])
def test_as_a_function_of_tokens_of_any_shape(weighted):
    """Gradients of strides 0 and transposed inputs included; p's gradient has its shape."""
    torch.manual_seed(0)
    y, p = torch.randn(12, 3, 2).permute(1, 2, 0).requires_grad_(), torch.rand(3, 2).requires_grad_()
    swiglu(y, p if weighted else None).sum().backward()
    exact_y, exact_p = (t.detach().double().requires_grad_() for t in (y, p))
    gate, value = exact_y.chunk(2, -1)
    (torch.nn.functional.silu(gate) * value * (exact_p if weighted else torch.ones(3, 2))[..., None]).sum().backward()
    torch.testing.assert_close(y.grad.double(), exact_y.grad, rtol=1e-5, atol=1e-5)
    if weighted:
        torch.testing.assert_close(p.grad.double(), exact_p.grad, rtol=1e-5, atol=1e-5)


def test_large_gates_stay_finite():
    y = torch.tensor([[-1e4, 1e4, 2.0, 2.0]])
    dy, dp, out = weighted_swiglu.backward(y, torch.ones(1), torch.ones(1, 2))
    assert torch.equal(out, torch.tensor([[0.0, 2e4]]))
    assert torch.equal(dy, torch.tensor([[0.0, 2.0, 0.0, 1e4]])) and torch.equal(dp, torch.tensor([2e4]))


def test_no_rows():
    dy, dp, out = weighted_swiglu.backward(torch.zeros(0, 8), torch.zeros(0), torch.zeros(0, 4))
    assert dy.shape == (0, 8) and dp.shape == (0,) and out.shape == (0, 4)
