"""Upstream's fused SwiGLU on our kernels, by Triton's interpreter, against its own formulas."""

import pytest
import torch

from megatron_hybrid.patches import patching, swiglu_kernels

pytestmark = pytest.mark.triton_interpreter


def results(weighted, monkeypatch, ours):
    from megatron.core.fusions import fused_bias_swiglu as upstream

    monkeypatch.setattr(swiglu_kernels, "can_run", lambda x: ours)
    torch.manual_seed(0)
    y, p, g = torch.randn(7, 2, 48, requires_grad=True), torch.rand(14, 1, requires_grad=True), torch.randn(7, 2, 24)
    out = upstream.weighted_bias_swiglu_impl(y, None, p) if weighted else upstream.bias_swiglu_impl(y, None)
    out.backward(g)
    return [out, y.grad, *([p.grad] if weighted else [])]


@pytest.mark.parametrize("weighted", [True, False])
def test_upstreams_function_is_the_same(monkeypatch, weighted):
    """It takes [s, b, 2f], and weights [s b, 1]."""
    from megatron_hybrid.patches import cpu

    cpu.install()  # which switches torch's compiler off
    patching.install(swiglu_kernels.TABLE)
    try:
        pairs = zip(*(results(weighted, monkeypatch, ours) for ours in (True, False)), strict=True)
    finally:
        patching.uninstall(swiglu_kernels.TABLE.name)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
