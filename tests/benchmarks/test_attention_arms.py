"""What the benchmark of attention counts, and its documents."""

import pytest
import torch

from megatron_hybrid.benchmarks.attention_arms import Shape, shapes
from megatron_hybrid.kernels.attention_masks import visible


@pytest.mark.parametrize("shape", shapes(3, 300), ids=lambda shape: shape.name)
@pytest.mark.parametrize("window", [None, 20])
def test_pairs_are_those_of_the_mask(shape, window):
    small = Shape(**(vars(shape) | {"document": shape.document and 50}))
    if shape.window is not None:
        small = Shape(**(vars(small) | {"window": window or 299, "sinks": 7}))
    documents = small.documents("cpu")
    mask = visible(300, 300, small.window, small.sinks, 0, torch.device("cpu"), documents)
    assert small.pairs() == mask.expand(3, 1, 300, 300).sum() if documents is not None else 3 * mask.sum()


def test_packed_documents_differ_and_have_their_length():
    ids = next(shape for shape in shapes(4, 8192) if shape.name == "* packed").documents("cpu")
    assert 500 < 4 * 8192 / (ids[:, -1] + 1).sum() < 2000
    assert not torch.equal(ids[0], ids[1])
