"""Ranks that hold different tokens drop different entries; ranks that hold the same, the same."""

from tests.model.test_layouts import DP, SP, TP2
from tests.support.training import dropped


def test_sequence_parallel_ranks_drop_independently(ranks):
    first, second = ranks(2).run(dropped, flags=f"{DP} {TP2} {SP}")
    share = sum(map(sum, first)) / (len(first) * len(first[0]))
    assert 0.35 < share < 0.65  # 512 draws at one half: six standard deviations are 0.13
    assert first != second


def test_tensor_parallel_ranks_drop_alike(ranks):
    first, second = ranks(2).run(dropped, flags=f"{DP} {TP2}")
    assert first == second
