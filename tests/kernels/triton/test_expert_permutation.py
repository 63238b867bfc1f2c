"""Tokens into the order of experts and back, by Triton's interpreter, against the same by words."""

import pytest
import torch

from megatron_hybrid.kernels import expert_rows

pytestmark = pytest.mark.triton_interpreter


def routed(tokens, experts, topk, seed=0):
    """[t, e] bool with topk experts each."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk, 1).indices, True)


def both(x, routing, p, dy, n):
    """Rows, their probabilities, the sum of the weighted rows, and the gradients of tokens and probabilities."""
    found = []
    for ours in (True, False):
        tokens, weights = x.clone().requires_grad_(), p.clone().requires_grad_()
        permute = expert_rows.permute if ours else expert_rows.permute_reference
        unpermute = expert_rows.unpermute if ours else expert_rows.unpermute_reference
        rows, row_weights, how = permute(tokens, routing, weights, n)
        y = unpermute((rows * row_weights[:, None]).to(x.dtype), how, len(x))
        y.backward(dy)
        found.append([rows, row_weights, y, tokens.grad, weights.grad])
    return zip(*found, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "channels"),
    [(1, 1, 1, 1), (70, 8, 1, 40), (33, 5, 3, 130), (64, 4, 4, 2048), (600, 8, 1, 16), (40, 200, 6, 8), (513, 3, 2, 5)],
    ids=str,
)
def test_outputs_and_gradients(tokens, experts, topk, channels, dtype):
    """One row a token is copied, so that nothing rounds; sums of several are in fp32 here, and in bf16 in the other."""
    torch.manual_seed(1)
    x, dy = (torch.randn(tokens, channels).to(dtype) for _ in range(2))
    pairs = both(x, routed(tokens, experts, topk), torch.rand(tokens, experts), dy, tokens * topk)
    for i, (ours, wanted) in enumerate(pairs):
        assert ours.dtype == wanted.dtype
        if topk == 1 or i < 2:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
        else:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=topk * 4 * torch.finfo(dtype).eps)


def test_experts_without_tokens_and_tokens_without_experts():
    """As under a capacity, and on a rank that has some of a token's experts."""
    torch.manual_seed(1)
    routing = torch.zeros(50, 6, dtype=torch.bool)
    routing[3:20, 4] = routing[10:12, 1] = True
    x, dy = torch.randn(50, 7), torch.randn(50, 7)
    for ours, wanted in both(x, routing, torch.rand(50, 6), dy, 19):
        torch.testing.assert_close(ours, wanted)


def test_no_tokens():
    x = torch.zeros(0, 8, requires_grad=True)
    rows, weights, how = expert_rows.permute(x, torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4), 0)
    assert rows.shape == (0, 8) and weights.shape == (0,)
    expert_rows.unpermute(rows, how, 0).sum().backward()
    assert x.grad.shape == (0, 8)


def test_rows_behind_the_last_are_left_out():
    x, routing = torch.arange(12.0).view(6, 2), torch.ones(6, 2, dtype=torch.bool)
    rows, _, how = expert_rows.permute(x, routing, None, 8)
    assert torch.equal(rows, torch.cat([x, x[:2]]))
    assert torch.equal(expert_rows.unpermute(rows, how, 6), x * torch.tensor([2, 2, 1, 1, 1, 1])[:, None])


def test_gradients_without_probabilities_of_any_layout():
    """``sum()`` gives a gradient whose strides are 0, a transposition one whose channels lie apart."""
    x = torch.randn(20, 8, requires_grad=True)
    routing = routed(20, 4, 2)
    rows, nothing, how = expert_rows.permute(x, routing, None, 40)
    assert nothing is None
    expert_rows.unpermute(rows, how, 20).sum().backward()
    assert torch.equal(x.grad, torch.full((20, 8), 2.0))
    x.grad = None
    wide = torch.randn(8, 20)
    expert_rows.unpermute(rows.detach() * 0 + expert_rows.permute(x, routing, None, 40)[0], how, 20).backward(wide.T)
    torch.testing.assert_close(x.grad, 2 * wide.T)


def test_more_pairs_than_an_int32_counts_are_refused():
    with pytest.raises(ValueError, match="below 2\\^31"):
        expert_rows.permute(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool).expand(2**20, 2**11), None, 1)
