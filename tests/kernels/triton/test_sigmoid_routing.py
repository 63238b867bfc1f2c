"""Choice of experts by Triton's interpreter, against the same by words in float64."""

import pytest
import torch

from megatron_hybrid.kernels.expert_choice import choose_experts, choose_experts_reference

pytestmark = pytest.mark.triton_interpreter


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("tokens", "experts", "topk"), [(1, 1, 1), (300, 8, 1), (70, 8, 2), (33, 5, 5), (20, 200, 6)], ids=str
)
def test_choice_probabilities_and_gradient(tokens, experts, topk, scale, biased):
    torch.manual_seed(0)
    logits, g = torch.randn(tokens, experts, requires_grad=True), torch.randn(tokens, experts)
    bias = torch.randn(experts) if biased else None
    exact = logits.detach().double().requires_grad_()
    found, chosen = choose_experts(logits, bias, topk, scale)
    wanted, right = choose_experts_reference(exact, bias, topk, scale)
    found.backward(g)
    wanted.backward(g.double())
    assert chosen.dtype == torch.bool and torch.equal(chosen, right)
    assert not chosen.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_token_always_has_as_many_experts():
    """Also where numbers are not finite, or equal: a step that is to be skipped must not end in an error."""
    logits = torch.zeros(4, 6)
    logits[1] = torch.nan
    logits[2, 3] = torch.nan
    logits[3] = torch.tensor([torch.inf, -torch.inf, 0.0, torch.inf, torch.nan, -torch.inf])
    for topk in (1, 3, 6):
        probabilities, chosen = choose_experts(logits, None, topk)
        assert chosen.sum(1).tolist() == [topk] * 4
        assert chosen[0, :topk].all() and chosen[2, 3] and chosen[3, 4]
        assert probabilities[0].isfinite().all()


def test_no_tokens():
    probabilities, chosen = choose_experts(torch.zeros(0, 4), None, 2)
    assert probabilities.shape == chosen.shape == (0, 4)
