"""Losses and gradients without the logits, against torch's cross entropy of all of them."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron_hybrid.benchmarks.timing import peak_memory
from megatron_hybrid.kernels.linear_cross_entropy import linear_cross_entropy

T, H, V = 37, 24, 60
SCALE = 0.37

# What the ranks run ---------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.double) -> tuple[torch.Tensor, ...]:
    """Hidden states [t, h], weight [v, h], labels [t], mask [t]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator) / 3
    mask = (torch.rand(T, generator=generator) > 0.3).float()
    labels = torch.randint(0, V, (T,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, mask


def of_a_share(masked: bool, chunk: int) -> dict[str, Any]:
    """This rank's losses, best logits and gradients, from its slice of the vocabulary."""
    group: Any = torch.distributed.group.WORLD
    hidden, whole, labels, mask = inputs()
    weight = whole.detach().chunk(group.size())[group.rank()].clone().requires_grad_()
    losses, top, column = linear_cross_entropy(
        hidden, weight, labels, mask if masked else None, group, chunk=chunk, best=True
    )
    (losses * mask).sum().mul(SCALE).backward()
    assert top is not None and column is not None and hidden.grad is not None and weight.grad is not None
    torch.distributed.all_reduce(hidden.grad)
    found = {"losses": losses, "top": top, "column": column, "hidden": hidden.grad, "weight": weight.grad}
    return {name: tensor.detach() for name, tensor in found.items()}


# Tests ----------------------------------------------------------------------------------------------


def of_all_logits(hidden, weight, labels, mask):
    losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    return losses, *torch.autograd.grad((losses * mask).sum() * SCALE, (hidden, weight))


def close(found, wanted, tolerance):
    for name, a, b in zip(("losses", "hidden", "weight"), found, wanted, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


# fp64: sums in another order. fp32: 6e-8 a rounding. bf16: logits and their gradient are rounded to 2^-9 as in the
# plain path, and the hidden states' gradient once more when it is scaled
TOLERANCE = {torch.double: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, T, 100])
def test_equals_the_cross_entropy_of_all_logits(dtype, masked, chunk):
    hidden, weight, labels, mask = inputs(dtype)
    losses, *best = linear_cross_entropy(hidden, weight, labels, mask if masked else None, chunk=chunk)
    found = losses, *torch.autograd.grad((losses * mask).sum() * SCALE, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert best == [None, None] and losses.dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in found[1:]] == [dtype] * 2
    close(found, of_all_logits(*exact, labels, mask), TOLERANCE[dtype])


def test_weights_of_tokens_need_not_be_0_or_1():
    hidden, weight, labels, _ = inputs()
    mask = torch.linspace(-1, 2, T)
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    found = losses, *torch.autograd.grad((losses * mask).sum() * SCALE, (hidden, weight))
    close(found, of_all_logits(hidden, weight, labels, mask), 1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_the_weights_gradient_is_added_to_a_total(dtype, masked):
    hidden, weight, labels, mask = inputs(dtype)
    total = torch.ones(V, H, dtype=torch.promote_types(dtype, torch.float32))
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask if masked else None, chunk=8, total=total)
    (losses * mask).sum().mul(SCALE).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert weight.grad is None
    close((losses, hidden.grad, total - 1), of_all_logits(*exact, labels, mask), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_one_process_where_the_vocabulary_is_divided(ranks, size, masked):
    hidden, weight, labels, mask = inputs()
    wanted = of_all_logits(hidden, weight, labels, mask)
    found = ranks(size).run(of_a_share, masked=masked, chunk=16)
    whole = torch.cat([f["weight"] for f in found])
    for one in found:
        close((one["losses"], one["hidden"], whole), wanted, 1e-14)
    tops = torch.stack([f["top"] for f in found])
    columns = torch.stack([f["column"] for f in found])
    owner = tops.argmax(0)
    best = columns.gather(0, owner[None])[0] + owner * (V // size)
    assert best.tolist() == (hidden @ weight.t()).argmax(-1).tolist()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_gradient_that_nobody_wants_is_none(frozen, masked):
    *leaves, labels, mask = inputs()
    leaves[frozen].requires_grad_(False)
    losses, *_ = linear_cross_entropy(*leaves, labels, mask if masked else None, chunk=8)
    (losses * mask).sum().mul(SCALE).backward()
    assert leaves[frozen].grad is None
    wanted = of_all_logits(*(x.detach().requires_grad_() for x in leaves), labels, mask)
    assert torch.allclose(leaves[1 - frozen].grad, wanted[2 - frozen], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda losses, mask: losses.sum(),
        lambda losses, mask: (losses * mask).square().sum(),
        lambda losses, mask: (losses * mask).sum() + 1e-3 * losses[0],
        lambda losses, mask: (losses * mask)[1:].sum(),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_losses_that_are_used_otherwise_than_said_are_an_error(reduce, first):
    hidden, weight, labels, mask = inputs()
    mask[0], mask[1] = first, 1 - first
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    value = reduce(losses, mask)
    (used,) = torch.autograd.grad(value, losses, retain_graph=True)
    if torch.equal(used, mask * used.max()):  # the last one of a first token that the mask leaves out anyway
        assert first == 0
        value.backward()
        return
    with pytest.raises(ValueError, match="Pass the mask by which the losses are multiplied, or none"):
        value.backward()


def test_of_no_token_alike():
    hidden, weight, labels, mask = inputs()
    mask.zero_()
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    (losses * mask).sum().backward(retain_graph=True)
    assert not hidden.grad.any() and not weight.grad.any()
    with pytest.raises(ValueError, match="Pass the mask"):
        losses[3].backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_reaches_the_gradients(bad):
    """What watches for bad steps finds it there."""
    hidden, weight, labels, mask = inputs(torch.float32)
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    ((losses * mask).sum() * bad).backward()
    assert not hidden.grad.isfinite().all() and not weight.grad.isfinite().all()


def test_a_label_outside_of_the_vocabulary_is_that_of_megatron():
    hidden, weight, labels, mask = inputs(torch.float32)
    labels[3], mask[3] = -100, 0
    losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    logits = (hidden @ weight.t())[3]
    assert losses[3].item() == pytest.approx((logits.logsumexp(0) - logits.max()).item(), rel=1e-5)
    (losses * mask).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[3].any()


def test_the_backward_pass_may_run_twice():
    hidden, weight, labels, mask = inputs()
    total = (linear_cross_entropy(hidden, weight, labels, mask, chunk=8)[0] * mask).sum()
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_none_are_computed():
    hidden, weight, labels, mask = inputs(torch.float32)
    with torch.no_grad():
        losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=8)
    assert not losses.requires_grad
    assert torch.allclose(losses, F.cross_entropy(hidden @ weight.t(), labels, reduction="none"), rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_the_logits_of_all_tokens_are_never_there(masked):
    tokens, h, v, chunk = 2048, 16, 1024, 64
    hidden, weight = torch.randn(tokens, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    labels, mask = torch.randint(0, v, (tokens,)), torch.ones(tokens)

    def step():
        losses, *_ = linear_cross_entropy(hidden, weight, labels, mask if masked else None, chunk=chunk)
        (losses * mask).sum().backward()

    # a chunk's logits with what the plain version makes of them, gradients of both inputs, some numbers a token
    assert peak_memory(step, torch.device("cpu")) < 6 * chunk * v * 4 + 4 * (tokens + v) * h * 4 + 64 * tokens
    assert 6 * chunk * v * 4 < tokens * v * 4 / 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.zeros(V, H + 1)}, r"not weight torch.float32 \[60, 25\]"),
        ({"weight": torch.zeros(V, H, dtype=torch.bfloat16)}, "not weight torch.bfloat16"),
        ({"labels": torch.zeros(T - 1, dtype=torch.long)}, r"labels \[36\]"),
        ({"mask": torch.ones(T, 1)}, r"the mask is \[37\].* not \[37, 1\]"),
        ({"chunk": 0}, "and 0"),
        ({"total": torch.zeros(V, H, dtype=torch.bfloat16)}, "summed up in torch.float32 of its shape, not"),
    ],
)
def test_mistakes_are_named(change, text):
    hidden, weight, labels, mask = inputs(torch.float32)
    given = {"hidden": hidden, "weight": weight, "labels": labels, "mask": mask, "chunk": 8} | change
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(**given)
