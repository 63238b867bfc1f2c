"""Collectives that Gloo does not have, against the obvious results."""

from typing import Any

import pytest


def uneven(sizes: list[int]) -> dict[str, bool]:
    """Gathers and reduce-scatters of unequal parts on two ranks against the obvious results."""
    import torch
    from megatron.core.tensor_parallel import mappings

    group = torch.distributed.group.WORLD
    rank = group.rank()
    whole = torch.arange(4.0 * sum(sizes)).reshape(-1, 4)
    weights = [torch.full_like(whole, 2.0) + i * whole for i in range(2)]
    part = whole.split(sizes)[rank].clone().requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(part, group=group, output_split_sizes=sizes)
    (gathered * weights[rank]).sum().backward()
    full = weights[rank].clone().requires_grad_()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(full, group=group, input_split_sizes=sizes)
    (scattered * (1.0 + rank)).sum().backward()
    factors = torch.cat([torch.full((n, 4), 1.0 + i) for i, n in enumerate(sizes)])
    return {
        "gathered": torch.equal(gathered, whole),
        "its gradient": torch.equal(part.grad, sum(weights).split(sizes)[rank]),
        "scattered": torch.equal(scattered, sum(weights).split(sizes)[rank]),
        "its gradient too": torch.equal(full.grad, factors),
        "the input is kept": torch.equal(full.detach(), weights[rank]),
    }


@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [2, 2]])
def test_unequal_parts_gather_and_scatter(ranks, sizes):
    for found in ranks(2).run(uneven, sizes=sizes):
        assert found == dict.fromkeys(found, True)


def exchange() -> dict[str, Any]:
    """The dispatcher's splits, and an all-to-all with them on two ranks: rank r sends r + 1 rows to rank 0."""
    import torch
    from megatron.core.tensor_parallel import all_to_all
    from megatron.core.transformer.moe import token_dispatcher

    rank = torch.distributed.get_rank()
    sent = torch.tensor([rank + 1, 3])
    received = torch.tensor([1, 2] if rank == 0 else [3, 3])
    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu
    splits = [to_cpu(t, as_numpy=True) for t in (received, sent)]
    x = (100.0 * rank + torch.arange(float(sent.sum()))).requires_grad_()
    y = all_to_all(torch.distributed.group.WORLD, x, *splits)
    (y * (rank + 1)).sum().backward()
    return {
        "kinds": [type(s).__name__ for s in splits],
        "untouched": to_cpu(received) is received and to_cpu(None, as_numpy=True) is None,
        "y": y.tolist(),
        "gradient": x.grad.tolist(),
    }


def test_the_dispatcher_exchanges_unequal_parts(ranks):
    first, second = ranks(2).run(exchange)
    assert first["kinds"] == second["kinds"] == ["ndarray", "ndarray"]
    assert first["untouched"] and second["untouched"]
    # rank 0 holds 0..3 and sends (0), (1 2 3); rank 1 holds 100..104 and sends (100 101), (102 103 104)
    assert first["y"] == [0, 100, 101]
    assert second["y"] == [1, 2, 3, 102, 103, 104]
    # the receiver's factor (1 on rank 0, 2 on rank 1) comes back to each row
    assert first["gradient"] == [1, 2, 2, 2]
    assert second["gradient"] == [1, 1, 2, 2, 2]
