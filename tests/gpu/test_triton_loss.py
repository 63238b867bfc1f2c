"""The loss without the logits on a GPU, at the sizes of training. Skipped without a CUDA device."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.loss_chunks import chunk_tokens
from megatron_hybrid.benchmarks.timing import peak_memory
from megatron_hybrid.costs.activations import head_saved, loss_temporary_bytes, total
from megatron_hybrid.kernels.linear_cross_entropy import linear_cross_entropy
from tests.costs.test_costs import SMALL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# fp32 products may use TF32 (10 bits). bf16: logits and their gradient are rounded to 2^-9 = 2e-3 of themselves, as in
# the plain path, and the gradient of the hidden states once more when it is scaled
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2}


def inputs(tokens, h, v, dtype):
    """Hidden states [t, h], weight [v, h], labels [t], mask [t]."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, h, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, device="cuda") / h**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (tokens,), generator=generator, device="cuda")
    return hidden, weight, labels, (torch.rand(tokens, generator=generator, device="cuda") > 0.3).float()


def error(found, wanted):
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("tokens", "h", "v", "chunk"), [(333, 96, 1000, 128), (257, 64, 50257, 100), (64, 32, 7, 64)])
def test_equals_the_formula(dtype, masked, tokens, h, v, chunk):
    hidden, weight, labels, mask = inputs(tokens, h, v, dtype)
    losses, top, column = linear_cross_entropy(hidden, weight, labels, mask if masked else None, chunk=chunk, best=True)
    gradients = torch.autograd.grad((losses * mask).sum() / 17, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    wanted = F.cross_entropy(logits, labels, reduction="none")
    for a, b in zip(
        (losses, *gradients), (wanted, *torch.autograd.grad((wanted * mask).sum() / 17, exact)), strict=True
    ):
        assert error(a, b) < TOLERANCE[dtype]
    assert top is not None and column is not None
    # the best of rounded logits may be another one that is as large
    best = logits.gather(1, column[:, None])[:, 0]
    assert error(best, logits.max(1).values) < TOLERANCE[dtype] and error(top, best) < TOLERANCE[dtype]


def test_the_sizes_of_a_1b_model():
    """32,768 tokens, 128,256 entries: against fp32 on slices, with the memory that a plan counts; twice the same."""
    tokens, h, v = 32768, 2048, 128256
    hidden, weight, labels, mask = inputs(tokens, h, v, torch.bfloat16)
    chunk = chunk_tokens(tokens, v, 2)
    found = {}

    def step():
        losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=chunk)
        found["losses"] = losses
        found["hidden"], found["weight"] = torch.autograd.grad((losses * mask).sum() / tokens, (hidden, weight))

    peak = peak_memory(step, torch.device("cuda"))
    sizes = replace(SMALL, hidden=h, padded_vocab=v, seq_length=tokens)
    settings = ActivationSettings(backend="torch")
    kept = [line for line in head_saved(sizes, Layout(), settings) if "norm" not in line.name]
    counted = total(kept) + loss_temporary_bytes(sizes, Layout(), settings)
    assert 0.9 * counted < peak < 1.1 * counted  # the results and a few numbers a token besides
    assert peak < 0.2 * tokens * v * 6
    first = dict(found)
    step()
    assert all(torch.equal(found[name], first[name]) for name in first)

    some = slice(20000, 20256)
    logits = hidden[some].detach().float() @ weight.detach().float().t()
    assert error(found["losses"][some], F.cross_entropy(logits, labels[some], reduction="none")) < 2e-2
    gradient = (logits.softmax(1) - F.one_hot(labels[some], v)) * mask[some, None] / tokens
    assert error(found["hidden"][some], gradient @ weight.detach().float()) < 2e-2
    entries, wanted = slice(128000, 128256), torch.zeros(256, h, device="cuda")
    for start in range(0, tokens, 2048):
        rows = slice(start, start + 2048)
        logits = hidden[rows].detach().float() @ weight.detach().float().t()
        gradient = logits.softmax(1)[:, entries]
        gradient[torch.arange(2048, device="cuda"), (labels[rows] - 128000).clamp(min=0)] -= (
            labels[rows] >= 128000
        ).float()
        wanted += (gradient * mask[rows, None] / tokens).t() @ hidden[rows].detach().float()
    assert error(found["weight"][entries], wanted) < 2e-2


def test_the_host_waits_for_nothing():
    hidden, weight, labels, mask = inputs(1000, 64, 5000, torch.bfloat16)

    def step():
        losses, *_ = linear_cross_entropy(hidden, weight, labels, mask, chunk=128)
        torch.autograd.grad((losses * mask).sum() / 17, (hidden, weight))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_beyond_2_31_elements():
    """17,000 rows of 128,256: the last ones are where they should be."""
    from megatron_hybrid.kernels.triton import cross_entropy

    rows, v = 17000, 128256
    logits = torch.zeros(rows, v, device="cuda", dtype=torch.bfloat16)
    logits[-1, 7] = 3
    labels, weights = torch.full((rows,), 7, device="cuda"), torch.ones(rows, device="cuda")
    found = cross_entropy.statistics(logits, labels, 0, weights)
    assert found.label[[0, -1]].tolist() == [0, 3] and found.maximum[[0, -1]].tolist() == [0, 3]
    assert logits[-2, 7].item() == -1 and logits[-1, 7].item() == pytest.approx(-1, abs=1e-2)


@pytest.mark.parametrize("way", ["sum", "otherwise"])
def test_a_wrong_mask_stops_the_device(way):
    """In a process of its own: a device-side assertion ends the use of the device."""
    from tests.support.processes import python

    reduce = {"sum": "(losses * mask).sum()", "otherwise": "losses.sum()"}[way]
    code = f"""
import torch
from megatron_hybrid.kernels.linear_cross_entropy import linear_cross_entropy
hidden, weight = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
mask = (torch.arange(64, device="cuda") > 5).float()
losses, *_ = linear_cross_entropy(hidden, weight, torch.arange(64, device="cuda"), mask, chunk=32)
{reduce}.backward()
torch.cuda.synchronize()
print("done")
"""
    ended = python("-c", code, timeout=120)
    assert ("done" in ended.stdout) == (way == "sum"), ended.stderr
