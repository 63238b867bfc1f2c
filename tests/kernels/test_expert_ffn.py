"""All experts' FFNs at once, in torch's operations, against one expert after the other in float64."""

import pytest
import torch

from megatron_hybrid.kernels.expert_ffn import Grouped, OneByOne, expert_ffn, expert_ffn_reference

CHANNELS, WIDTH = 16, 24
WAYS = {
    "grouped": lambda counts: Grouped(torch.tensor(counts).cumsum(0).int()),
    "one-by-one": OneByOne,
}


@pytest.mark.parametrize("way", WAYS)
# bf16: inputs of each product, its output and the activation are rounded to 8 bits, relative to the largest entry
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("counts", [[5, 0, 33, 1], [0, 0, 3, 0], [16, 16], [7]], ids=str)
def test_output_and_every_gradient(way, counts, dtype, bound):
    torch.manual_seed(0)
    rows, experts = sum(counts), len(counts)
    x, dy = (torch.randn(rows, CHANNELS).to(dtype) for _ in range(2))
    weights = [torch.randn(2 * WIDTH, CHANNELS).to(dtype) for _ in range(experts)]
    weights += [torch.randn(CHANNELS, WIDTH).to(dtype) for _ in range(experts)]
    p = torch.rand(rows)
    ours = [t.clone().requires_grad_() for t in (x, p, *weights)]
    exact = [t.double().requires_grad_() for t in (x, p, *weights)]
    first, second = slice(2, 2 + experts), slice(2 + experts, None)
    found = expert_ffn(ours[0], ours[1], WAYS[way](counts), ours[first], ours[second])
    wanted = expert_ffn_reference(exact[0], exact[1], counts, exact[first], exact[second])
    found.backward(dy)
    wanted.backward(dy.double())
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for a, b in pairs:
        assert a.dtype == (torch.float32 if a is ours[1].grad else dtype)
        assert (a.double() - b).abs().max() <= bound * b.abs().max()


def test_weights_that_are_frozen_get_no_gradients():
    weights = [torch.randn(2 * WIDTH, CHANNELS), torch.randn(CHANNELS, WIDTH)]
    x = torch.randn(3, CHANNELS, requires_grad=True)
    expert_ffn(x, torch.rand(3), OneByOne([3]), weights[:1], weights[1:]).sum().backward()
    assert x.grad is not None and all(w.grad is None for w in weights)
