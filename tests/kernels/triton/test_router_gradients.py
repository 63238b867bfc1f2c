"""Gradients of a router's product by Triton's interpreter, against float64."""

import pytest
import torch

from megatron_hybrid.kernels.triton import router_gradients

pytestmark = pytest.mark.triton_interpreter


@pytest.mark.parametrize("programs", [1024, 3])  # a tile for each program, and several
@pytest.mark.parametrize(("tokens", "experts", "channels"), [(1, 1, 1), (100, 8, 70), (64, 16, 128), (300, 5, 65)])
def test_gradients(monkeypatch, tokens, experts, channels, programs):
    monkeypatch.setattr(router_gradients, "PROGRAMS", programs)
    torch.manual_seed(0)
    g, x = torch.randn(tokens, experts), torch.randn(tokens, channels).bfloat16()
    weight = torch.randn(experts, channels).bfloat16()
    dx, dw = router_gradients.gradients(g, x, weight)
    for ours, wanted in ((dx, g.double() @ weight.double()), (dw, g.double().T @ x.double())):
        assert ours.dtype == torch.bfloat16
        # rounded once, to 8 bits
        assert (ours.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_gradients_in_fp32_keep_its_bits():
    torch.manual_seed(0)
    g, x, weight = torch.randn(90, 4), torch.randn(90, 33), torch.randn(4, 33)
    dx, dw = router_gradients.gradients(g, x, weight)
    torch.testing.assert_close(dx.double(), g.double() @ weight.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(dw.double(), g.double().T @ x.double(), rtol=0, atol=1e-5)
