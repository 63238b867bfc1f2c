"""Ranks that hold different tokens drop different entries; ranks that hold the same, the same."""

from tests.model.test_layouts import DP, SP, TP2
from tests.support.training import Run


def dropped(flags: str) -> list[list[bool]]:
    """Which entries of this rank's output of a stack of one layer are dropped, token by token."""
    import torch

    run = Run("M", f"{flags} --hidden-dropout 0.5")
    stack = run.model[0].module.decoder.train()
    shared = torch.Generator().manual_seed(3)
    length = run.args.seq_length // (run.args.tensor_model_parallel_size if run.args.sequence_parallel else 1)
    x = torch.randn(length, 1, run.args.hidden_size, generator=shared)
    norm, stack.final_norm = stack.final_norm, torch.nn.Identity()
    result = (stack(x, None) == x).squeeze(1).tolist()
    stack.final_norm = norm
    return result


def test_sequence_parallel_ranks_drop_independently(ranks):
    first, second = ranks(2).run(dropped, flags=f"{DP} {TP2} {SP}")
    share = sum(map(sum, first)) / (len(first) * len(first[0]))
    assert 0.35 < share < 0.65  # 512 draws at one half: six standard deviations are 0.13
    assert first != second


def test_tensor_parallel_ranks_drop_alike(ranks):
    first, second = ranks(2).run(dropped, flags=f"{DP} {TP2}")
    assert first == second
