"""FusedAdam: torch's arithmetic with one step count for each group."""

import copy

import pytest
import torch

from megatron_hybrid.patches.adam import FusedAdam

SHAPES = [(7, 5), (11,), (3, 2, 4)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params):
    """Two groups with settings of their own, beside a parameter that never has a gradient."""
    unused = torch.nn.Parameter(torch.ones(2))
    return [
        {"params": [params[0], unused], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[1:], "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95)},
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def steps(optimizer, params, first, last):
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize(("adam_w", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_bit_for_bit(adam_w, reference, decay):
    ours, theirs = parameters(), parameters()
    a = FusedAdam(groups(ours), weight_decay=decay, adam_w_mode=adam_w)
    # the multi-tensor form is what CUDA runs too; torch takes the single-tensor one on a CPU unless asked
    b = reference(groups(theirs), weight_decay=decay, foreach=True)
    for step in range(5):
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, step)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
            assert torch.equal(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"])


def test_state_is_what_megatron_shards():
    params = parameters()
    optimizer = FusedAdam(groups(params))
    steps(optimizer, params, 0, 3)
    unused = optimizer.param_groups[0]["params"][1]
    assert unused not in optimizer.state
    for p in params:
        assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"}
        assert all(value.shape == p.shape for value in optimizer.state[p].values())
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]


def test_a_group_without_gradients_counts_no_step():
    params = parameters()
    optimizer = FusedAdam(groups(params))
    set_gradients(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert [group.get("step", 0) for group in optimizer.param_groups] == [0, 1]
    assert torch.equal(params[0], before)


def test_a_stored_state_continues_bit_for_bit():
    straight, resumed = parameters(), parameters()
    a = FusedAdam(groups(straight))
    steps(a, straight, 0, 5)
    b = FusedAdam(groups(resumed))
    steps(b, resumed, 0, 2)
    stored = copy.deepcopy(b.state_dict())
    c = FusedAdam(groups(resumed))
    c.load_state_dict(stored)
    assert [group["step"] for group in c.param_groups] == [2, 2]
    steps(c, resumed, 2, 5)
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="--optimizer-cuda-graph"):
        FusedAdam(parameters(), capturable=True)
    with pytest.raises(ValueError, match="closure"):
        FusedAdam(parameters()).step(lambda: 0.0)
