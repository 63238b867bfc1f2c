"""Experts on a GPU: kernels against float64 at real sizes, layers against upstream's way. Skipped without CUDA."""

import pytest
import torch

from megatron_hybrid.kernels import expert_rows
from megatron_hybrid.kernels.expert_choice import choose_experts, choose_experts_reference
from megatron_hybrid.kernels.expert_ffn import Grouped, OneByOne, expert_ffn, expert_ffn_reference
from megatron_hybrid.kernels.router_product import router_product
from tests.kernels.triton.test_expert_permutation import both, routed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no CUDA device from sm90 on"
)

WAYS = {
    "grouped": lambda counts: Grouped(torch.tensor(counts, device="cuda").cumsum(0).int()),
    "one-by-one": OneByOne,
}
BF16 = 2e-2
"""Inputs of two products, their outputs and the activation are rounded to 8 bits, relative to the largest entry."""


def relative(found, wanted):
    return ((found.cpu().double() - wanted.cpu()).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "channels"),
    [(4099, 8, 1, 2048), (4099, 8, 2, 2048), (1000, 64, 6, 1030), (777, 128, 8, 512), (33, 5, 3, 130)],
    ids=str,
)
def test_permutation(tokens, experts, topk, channels, dtype):
    torch.manual_seed(1)
    x, dy = (torch.randn(tokens, channels).to("cuda", dtype) for _ in range(2))
    routing = routed(tokens, experts, topk).cuda()
    p = torch.rand(tokens, experts, device="cuda")
    for i, (ours, wanted) in enumerate(both(x, routing, p, dy, tokens * topk)):
        exact = topk == 1 or i < 2
        bound = 0.0 if exact else topk * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, wanted, rtol=0, atol=bound)


def test_permutation_is_the_same_each_time():
    torch.manual_seed(1)
    x, dy = (torch.randn(30000, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    routing, p = routed(30000, 16, 4).cuda(), torch.rand(30000, 16, device="cuda")
    first, second = ([ours.clone() for ours, _ in both(x, routing, p, dy, 120000)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_beyond_the_32_bits_of_an_offset():
    """2^31 entries are 1,048,576 rows of 2,048, of which the last ones are looked at."""
    tokens, channels = 2**20 + 64, 2048
    x = torch.empty(tokens, channels, device="cuda", dtype=torch.bfloat16)
    x[-64:] = torch.randn(64, channels, device="cuda", dtype=torch.bfloat16)
    routing = torch.zeros(tokens, 2, dtype=torch.bool, device="cuda")
    routing[:, 1] = True
    routing[-64:-32] = routing[-64:-32].flip(1)
    rows, _, how = expert_rows.permute(x, routing, None, tokens)
    assert torch.equal(rows[:32], x[-64:-32]) and torch.equal(rows[-32:], x[-32:])
    assert torch.equal(expert_rows.unpermute(rows, how, tokens)[-64:], x[-64:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counts", [[1000, 0, 24, 0, 777, 0, 1, 0], [0, 0, 3, 0], [2048, 1999]], ids=str)
def test_experts(way, counts):
    torch.manual_seed(0)
    channels, width, experts = 512, 768, len(counts)
    shapes = [(sum(counts), channels), *[(2 * width, channels)] * experts, *[(channels, width)] * experts]
    x, *weights = (torch.randn(*shape).to("cuda", torch.bfloat16) / shape[1] ** 0.5 for shape in shapes)
    p, dy = torch.rand(len(x), device="cuda"), torch.randn_like(x)
    poison = [torch.full((2**n,), torch.nan, device="cuda") for n in range(10, 24)]
    del poison  # gradients of experts without tokens are written, and not zero by luck
    ours = [t.clone().requires_grad_() for t in (x, p, *weights)]
    exact = [t.cpu().double().requires_grad_() for t in (x, p, *weights)]
    found = expert_ffn(ours[0], ours[1], WAYS[way](counts), ours[2 : 2 + experts], ours[2 + experts :])
    wanted = expert_ffn_reference(exact[0], exact[1], counts, exact[2 : 2 + experts], exact[2 + experts :])
    found.backward(dy)
    wanted.backward(dy.cpu().double())
    errors = [relative(found, wanted), *(relative(a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    assert max(errors) < BF16


@pytest.mark.parametrize(("tokens", "experts"), [(8192, 8), (1001, 64), (333, 5)], ids=str)
def test_router(tokens, experts):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 2048).to("cuda", torch.bfloat16) / 45 for n in (tokens, experts))
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.cpu().double().requires_grad_() for t in (x, weight)]
    scores, wanted = router_product(ours[0].view(-1, 1, 2048), ours[1]), exact[0] @ exact[1].T
    dy = torch.randn(tokens, experts)
    scores.backward(dy.cuda().view_as(scores))
    wanted.backward(dy.double())
    assert scores.dtype == torch.float32
    assert relative(scores.view(tokens, experts), wanted) < 1e-5  # exact products, sums of 2,048 in fp32
    # rounded once, to 8 bits
    assert max(relative(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)) < 2**-8


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(32768, 8, 1), (1001, 64, 6), (333, 200, 8)], ids=str)
def test_choice_of_experts(tokens, experts, topk):
    torch.manual_seed(0)
    logits, bias, g = (torch.randn(*shape) for shape in ((tokens, experts), (experts,), (tokens, experts)))
    ours, exact = logits.cuda().requires_grad_(), logits.double().requires_grad_()
    found, chosen = choose_experts(ours, bias.cuda(), topk, 2.5)
    wanted, right = choose_experts_reference(exact, bias, topk, 2.5)
    found.backward(g.cuda())
    wanted.backward(g.double())
    same = (chosen.cpu() == right).all(1)  # scores that are alike to fp32's bits may be taken for one another
    assert same.float().mean() > 0.999
    torch.testing.assert_close(found.cpu().double()[same], wanted[same], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu().double()[same], exact.grad[same], rtol=1e-5, atol=1e-6)


# Whole layers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    from argparse import Namespace

    from megatron_hybrid.benchmarks.single_layers import Bench

    sizes = {"hidden-size": 512, "moe-ffn-hidden-size": 512, "moe-shared-expert-intermediate-size": 512}
    options = {"recipe": "paper-1b-inter-moe", "length": [1024], "micro_batch": 2, "repeats": 1, "device": "cuda"}
    found = Bench(
        Namespace(**options, size=None, dtype="bf16", deterministic=False),
        ["--backend", "torch", *(word for name, size in sizes.items() for word in (f"--{name}", str(size)))],
    )
    yield found
    found.close()


@pytest.fixture
def layer(bench):
    from megatron_hybrid.benchmarks.single_layers import Case

    layers, _ = bench.build(Case("E", "E"), 1024)
    return layers


def results(layers, way):
    from megatron_hybrid.benchmarks import expert_ways

    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(1024, 2, 512, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.requires_grad_(), *layers.parameters()]
    with expert_ways.going(way):
        y = layers[0](hidden_states=x, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(dy)
    found = [y.detach(), *(t.grad for t in leaves)]
    for t in leaves:
        t.grad = None
    return found


def test_a_layer_is_upstreams(layer):
    from megatron_hybrid.benchmarks.expert_ways import WAYS as LAYERS

    wanted, *others = (results(layer, way) for way in LAYERS.values())
    for found in others:
        errors = [relative(ours, theirs.double()) for ours, theirs in zip(found, wanted, strict=True)]
        assert max(errors) < BF16


def test_a_layer_of_grouped_products_never_waits_for_the_device(layer):
    from megatron_hybrid.benchmarks.expert_ways import WAYS as LAYERS

    way = LAYERS["one pass each, grouped"]
    results(layer, way)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(layer, way)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_activations_are_those_that_are_planned(bench, layer):
    from megatron_hybrid.accounting.activation_settings import ActivationSettings
    from megatron_hybrid.accounting.layout import Layout
    from megatron_hybrid.benchmarks.single_layers import Case
    from megatron_hybrid.costs import sizes_of
    from megatron_hybrid.costs.activations import layer_activation_bytes
    from tests.costs.test_activations_measured import Kept

    args = bench.parse(Case("E", "E"), 1024)
    x = torch.randn(1024, 2, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    with Kept(layer) as kept:
        y = layer[0](hidden_states=x, attention_mask=None)
    y = y[0] if isinstance(y, tuple) else y
    counted = layer_activation_bytes("E", sizes_of(args), Layout.from_args(args), ActivationSettings.from_args(args))
    assert kept.bytes(but=y) == pytest.approx(counted, rel=0.005)
