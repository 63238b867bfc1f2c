"""Settings that the tests of several modules of data/ share."""

import pytest

from megatron_hybrid.data import batches, parquet


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of 2,000 bytes, so that a small corpus has many."""
    for module in (batches, parquet):
        monkeypatch.setattr(module, "BATCH_BYTES", 2000)
