"""The Triton kernels of the cross entropy, interpreted, against those in plain PyTorch."""

import pytest
import torch

from megatron_hybrid.kernels import cross_entropy_rows

pytestmark = pytest.mark.triton_interpreter

# fp32 sums of up to 5,000 terms in another order; bf16 rounds the same gradients to 2^-9, ties apart
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def rows(width, dtype, tokens=5):
    generator = torch.Generator().manual_seed(width)
    logits = (3 * torch.randn(tokens, width, generator=generator)).to(dtype)
    labels = torch.randint(0, width, (tokens,), generator=generator)
    labels[0], labels[-1] = 0, width - 1
    return logits, labels, torch.rand(tokens, generator=generator)


def close(found, wanted, dtype):
    assert (found.float() - wanted.float()).abs().max() <= TOLERANCE[dtype] * wanted.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 129, 2048, 3000, 4096, 5000])  # one block and two; with a rest and without
def test_statistics_and_gradient_in_one_pass(width, dtype):
    from megatron_hybrid.kernels.triton import cross_entropy

    logits, labels, weights = rows(width, dtype)
    weights[1] = 0
    ours = logits.clone()
    wanted = cross_entropy_rows.statistics(logits, labels, 0, weights, best=True)
    found = cross_entropy.statistics(ours, labels, 0, weights, best=True)
    for a, b in zip(found[:3], wanted[:3], strict=True):
        close(a, b, torch.float32)
    assert found.best.tolist() == wanted.best.tolist()
    close(ours, logits, dtype)
    assert not ours[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slice_of_the_vocabulary(dtype):
    """Labels that other ranks have; a chunk's logits that are rows of a larger buffer; labels with a stride."""
    from megatron_hybrid.kernels.triton import cross_entropy

    logits, labels, weights = rows(300, dtype)
    buffer = torch.full((7, 320), 7.0, dtype=dtype)
    ours = buffer[:5, :300]
    ours.copy_(logits)
    labels = torch.stack([labels + 600, labels], 1)[:, 0]
    labels[1], labels[2], labels[3] = 599, 900, -100
    found, wanted = (k.statistics(x, labels, 600) for k, x in ((cross_entropy, ours), (cross_entropy_rows, logits)))
    assert found.label.isinf().tolist() == [False, True, True, True, False] and found.best is None
    assert torch.equal(found.label, wanted.label) and torch.equal(ours, logits)
    log_total = found.maximum + found.total.log() + 0.5
    cross_entropy.gradient_(ours, labels, 600, log_total, weights)
    cross_entropy_rows.gradient_(logits, labels, 600, log_total, weights)
    close(ours, logits, dtype)
    assert (buffer[:, 300:] == 7).all() and (buffer[5:] == 7).all()


def test_the_first_of_equal_logits_is_the_best():
    from megatron_hybrid.kernels.triton import cross_entropy

    logits = torch.zeros(2, 4000)  # two blocks
    logits[1, [17, 18, 3900]] = 1
    assert cross_entropy.statistics(logits, torch.zeros(2, dtype=torch.long), best=True).best.tolist() == [0, 17]


def test_rows_that_are_not_contiguous_are_refused():
    from megatron_hybrid.kernels.triton import cross_entropy

    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy.statistics(torch.zeros(4, 6)[:, ::2], torch.zeros(4, dtype=torch.long))
