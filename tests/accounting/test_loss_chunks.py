"""Which runs compute their loss without the logits, and in which chunks."""

from types import SimpleNamespace

import pytest

from megatron_hybrid.accounting.loss_chunks import CHUNK_BYTES, NEEDS_LOGITS, chunk_tokens, fuses_loss


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("needs", [None, *NEEDS_LOGITS])
def test_auto_is_fused_on_cuda_where_nothing_needs_the_logits(device, needs):
    given = SimpleNamespace(device=device, **({needs: True} if needs else {}))
    assert fuses_loss(given) == (device != "cpu" and needs is None)
    assert [fuses_loss(SimpleNamespace(device=device, loss_kernel=k)) for k in ("fused", "plain")] == [True, False]


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "each", "chunk"),
    [
        (32768, 128256, 2, 4096),
        (32768, 64128, 2, 8192),
        (8192, 128256, 2, 4096),
        (9000, 128256, 2, 3072),  # three equal chunks of at most 4,185
        (100, 128256, 2, 100),
        (1000, 2**24, 4, 16),  # fewer than 128 fit: 63 chunks of the 64 MiB row
        (3, 2**31, 4, 1),
    ],
)
def test_chunks(tokens, vocabulary, each, chunk):
    assert chunk_tokens(tokens, vocabulary, each) == chunk
    assert chunk * vocabulary * each <= CHUNK_BYTES or chunk == 1
