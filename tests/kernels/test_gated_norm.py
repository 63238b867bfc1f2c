"""The gated RMSNorm against its formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from megatron_hybrid.kernels.gated_norm import GatedRMSNorm


def formula(x, weight, z, eps, group_size, norm_before_gate):
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    rows = x.reshape(*x.shape[:-1], -1, group_size)
    y = (rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape) * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [None, "before", "after"])
@pytest.mark.parametrize("group_size", [None, 24, 8])
def test_equals_the_formula(group_size, gate, dtype):
    torch.manual_seed(0)
    norm = GatedRMSNorm(24, group_size=group_size, norm_before_gate=gate == "after", dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 24, dtype=dtype, requires_grad=True)
    z = None if gate is None else torch.randn(5, 2, 24, dtype=dtype, requires_grad=True)
    leaves = [t for t in (x, norm.weight, z) if t is not None]
    y, dy = norm(x, z), torch.randn(5, 2, 24, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = formula(exact[0], exact[1], exact[2] if gate else None, 1e-5, group_size or 24, gate == "after")
    grads = torch.autograd.grad(y, leaves, dy)
    exact_grads = torch.autograd.grad(wanted, exact, dy.double())
    # fp32: some roundings of 6e-8. bf16: fp32 inside, the result rounded once to 2^-9 of itself.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for got, want in zip((y, *grads), (wanted, *exact_grads), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_has_the_contract_that_megatron_derives_from():
    """core/ssm/mamba_mixer.py: constructor keywords, one weight, a bias of None."""
    norm = GatedRMSNorm(16, eps=1e-5, group_size=8, norm_before_gate=False, device="cpu", dtype=torch.bfloat16)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    assert norm.weight.dtype == torch.bfloat16 and bool((norm.weight == 1).all())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="group_size is 5"):
        GatedRMSNorm(16, group_size=5)
    with pytest.raises(ValueError, match="z has shape"):
        GatedRMSNorm(16)(torch.zeros(2, 16), torch.zeros(16))
