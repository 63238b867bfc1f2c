"""The Triton RMSNorm against its formula, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.norms import rms_norm
from megatron_hybrid.kernels.triton import configs
from megatron_hybrid.kernels.triton.rms_norm import rms_norm_forward
from tests.support.norm_cases import TOLERANCE, norm_errors, random

pytestmark = pytest.mark.triton_interpreter


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Programs of a backward pass that step through several tiles."""
    for key, line in list(configs.TABLE.items()):
        if key[0] == "rms_norm_backward":
            monkeypatch.setitem(configs.TABLE, key, {**line, "PROGRAMS": 4})


def check(found, dtype):
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [{}, {"residual": False}, {"weight": False}, {"columns": 8}], ids=str)
@pytest.mark.parametrize(("s", "b", "groups", "width"), [(1, 1, 1, 16), (11, 2, 1, 48), (21, 3, 2, 24), (9, 1, 1, 300)])
def test_output_and_all_gradients(s, b, groups, width, dtype, case):
    check(norm_errors(s, b, groups, width, dtype, **case), dtype)


def test_an_fp32_input_has_a_norm_in_the_weights_dtype():
    """As under an fp32 residual: the gradient of x is fp32, that of the weight bf16."""
    x = random(5, 1, 32, dtype=torch.float32, seed=0).requires_grad_()
    weight = random(32, dtype=torch.bfloat16, seed=1).requires_grad_()
    y, _ = rms_norm(x, weight, 1e-5, dtype=weight.dtype)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_a_residual_alone_passes_its_gradient():
    x = random(3, 2, 16, dtype=torch.float32, seed=0).requires_grad_()
    _, residual = rms_norm(x, None, 1e-5)
    residual.backward(torch.full_like(residual, 2.0))
    assert bool((x.grad == 2).all())


def test_mistakes_are_named():
    x = torch.zeros(2, 1, 12)
    with pytest.raises(ValueError, match="5 groups of 12 channels"):
        rms_norm_forward(x, None, 5, 1e-5, x)
    with pytest.raises(ValueError, match="at most 8192"):
        rms_norm_forward(torch.zeros(1, 1, 9000), None, 1, 1e-5, torch.zeros(1, 1, 9000))
    with pytest.raises(ValueError, match="factor has shape"):
        rms_norm_forward(x, torch.ones(5), 1, 1e-5, x)
    with pytest.raises(ValueError, match="last stride of 1"):
        rms_norm_forward(x, None, 1, 1e-5, torch.zeros(2, 1, 24)[..., ::2])
