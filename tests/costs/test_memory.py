"""Memory of one rank: the arithmetic of buffers, storage from flags, and sums that must come out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.storage import NOT_COUNTED, Storage
from megatron_hybrid.accounting.tensors import Tensor
from megatron_hybrid.costs.buffers import Buffer, plain_buffer, sharded_buffer
from megatron_hybrid.costs.memory import largest_rank, rank_memory, stage_parameters
from megatron_hybrid.costs.parameters import layer_parameters, layer_tensors, model_parameters
from megatron_hybrid.pattern import parse

# All widths multiples of 128, so that nothing is padded
SIZES = Sizes(
    hidden=256,
    padded_vocab=1024,
    seq_length=128,
    heads=4,
    query_groups=4,
    head_dim=64,
    mamba_heads=128,
    mamba_head_dim=4,
    mamba_groups=4,
    state_dim=64,
    ffn=512,
    experts=8,
    expert_ffn=128,
)

TENSORS = st.lists(st.builds(Tensor, st.integers(1, 300), st.just(False), st.booleans()), min_size=1, max_size=12)


def buffer_by_hand(tensors, ranks, bucket_size, divisor):
    """For each bucket one entry for each place: whether it belongs to a parameter."""
    buckets, places = [], []

    def close():
        places.extend([False] * (-len(places) % divisor))
        buckets.append(list(places))
        places.clear()

    for tensor in reversed(tensors):
        if tensor.own_bucket and places:
            close()
        places.extend([False] * (-len(places) % 64))
        places.extend([True] * tensor.size)
        if tensor.own_bucket or bucket_size and len(places) >= bucket_size:
            close()
    if places:
        close()
    return buckets


@given(TENSORS, st.sampled_from([1, 2, 3, 8, 100]), st.sampled_from([None, 1, 200, 1000]))
def test_shards_own_what_lies_in_them(tensors, ranks, bucket_size):
    buckets = buffer_by_hand(tensors, ranks, bucket_size, math.lcm(ranks, 128))
    found = sharded_buffer(tensors, ranks, bucket_size)
    assert found.size == sum(map(len, buckets))
    share = [len(bucket) // ranks for bucket in buckets]
    for rank, owned in enumerate(found.owned):
        assert owned == sum(sum(b[rank * n : (rank + 1) * n]) for b, n in zip(buckets, share, strict=True))
    assert sum(found.owned) == plain_buffer(tensors).size


def test_buckets_end_where_bandwidth_is_high():
    found = sharded_buffer([Tensor(100), Tensor(2**16), Tensor(60)], ranks=4, bucket_size=200, pads_for_bandwidth=True)
    # the last two tensors fill a bucket, of 64 + 2**16, so that it ends at 2 * 2**16; then the first one
    assert found == Buffer(3 * 2**16, (60 + 2**15 - 64 + 100, 2**15, 64, 0))


def test_bytes_per_parameter_are_those_of_mixed_precision():
    """2 for the parameter, 4 for its gradient, 12 for main parameter and moments; these shared by the replicas."""
    pattern, layout = parse("M*-E"), Layout(dp=4)
    n = model_parameters(pattern, SIZES).total
    assert largest_rank(pattern, SIZES, layout, Storage()).total == 18 * n
    assert largest_rank(pattern, SIZES, layout, Storage(distributed=True)).total == 6 * n + 12 * n // 4


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_the_model_and_copies_of_the_embedding(tied):
    """As real models do: tests/costs/test_memory_measured.py."""
    sizes, embedding = replace(SIZES, tied=tied), 1024 * 256
    for text, copies in (("M*|-E", tied), ("M*|-E/M-", 1)):
        pattern = parse(text)
        parts = [stage_parameters(pattern, sizes, Layout(pp=2), stage) for stage in (0, 1)]
        assert sum(p.total for p in parts) == model_parameters(pattern, sizes).total + copies * embedding
        assert [p.experts for p in parts] == [0, 8 * 3 * 256 * 128]


def test_tensor_parallel_ranks_share_all_but_norms_and_rows_in_common():
    for symbol, whole in (("*", 256), ("M", 256), ("-", 256), ("E", 256 + 256 * 8)):
        one = layer_parameters(symbol, SIZES).total
        assert 2 * sum(t.size for t in layer_tensors(symbol, SIZES, tp=2)) == one + whole
    few = replace(SIZES, mamba_groups=1)
    states = 2 * 64 * (256 + 5)  # B and C of one group: rows of the projection, taps and bias of the convolution
    one = layer_parameters("M", few).total
    assert 2 * sum(t.size for t in layer_tensors("M", few, tp=2)) == one + 256 + states


def test_experts_of_their_own_layout_are_told_apart():
    pattern, storage = parse("*E"), Storage(distributed=True)
    together = rank_memory(pattern, SIZES, Layout(dp=4), storage, 0)
    assert together.experts.total == 0
    found = rank_memory(pattern, SIZES, Layout(dp=4, ep=2), storage, 0)
    n = 4 * 3 * 256 * 128  # half of the experts, whose state two ranks share
    assert found.experts.total == n * (6 + 12 // 2)
    assert found.dense.total + found.experts.total == found.total
    assert found.dense.total < together.total


def of_flags(**flags):
    return Storage.from_args(SimpleNamespace(**flags))


def test_storage_of_flags():
    assert of_flags() == Storage(parameter=4, gradient=4, main=0, moments=8)
    assert of_flags(bf16=True) == Storage()
    assert of_flags(bf16=True, grad_reduce_in_bf16=True).gradient == 2
    assert of_flags(fp16=True).gradient == 2  # Megatron asks for fp32 under bf16 alone
    assert of_flags(fp16=True, accumulate_allreduce_grads_in_fp32=True).gradient == 4
    assert of_flags(optimizer="sgd", sgd_momentum=0.0).optimizer == 0
    assert of_flags(optimizer="sgd", bf16=True).optimizer == 8
    precise = {"bf16": True, "use_distributed_optimizer": True, "use_precision_aware_optimizer": True}
    assert of_flags(**precise).optimizer == 2 + 8
    assert of_flags(**precise, store_param_remainders=False).optimizer == 4 + 8
    assert of_flags(**precise, exp_avg_dtype="fp8", exp_avg_sq_dtype="torch.bfloat16").optimizer == 2 + 1 + 2
    assert of_flags(**precise, main_params_dtype="fp16", main_grads_dtype="bf16").optimizer == 2 + 8
    assert of_flags(**precise, main_grads_dtype="bf16").gradient == 2


def test_buckets_of_flags():
    layout = Layout(dp=64, cp=2)
    assert of_flags(ddp_bucket_size=7).bucket_elements(layout, 100) is None
    assert of_flags(overlap_grad_reduce=True, ddp_bucket_size=7).bucket_elements(layout, 100) == 7
    assert of_flags(overlap_grad_reduce=True, ddp_num_buckets=3).bucket_elements(layout, 100) == 33
    assert of_flags(overlap_grad_reduce=True).bucket_elements(layout, 100) == 128_000_000
    assert of_flags(overlap_grad_reduce=True).bucket_elements(Layout(), 100) == 40_000_000


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_settings_that_are_not_counted(name):
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"--{flag} .* not counted"):
        of_flags(**{name: True})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"optimizer": "muon"}, "--optimizer muon: .* not counted"),
        ({"optimizer": "sgd", "use_distributed_optimizer": True}, "shards Adam's state alone"),
        ({"tensor_parallel_num_weight_shards": 4, "tensor_model_parallel_size": 2}, "weight-shards 4 on 2"),
        ({"expert_tensor_parallel_num_weight_shards": 2}, "weight-shards 2 on 1"),
        ({"exp_avg_dtype": "int4"}, "int4 is no precision"),
    ],
)
def test_storage_that_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        of_flags(**flags)


def test_layouts_without_whole_replicas_are_refused():
    pattern, storage = parse("*E"), Storage(distributed=True, optimizer_instances=3)
    with pytest.raises(ValueError, match="4 replicas do not divide into .* 3"):
        largest_rank(pattern, SIZES, Layout(dp=4), storage)
    with pytest.raises(ValueError, match="0 replicas"):
        largest_rank(pattern, SIZES, Layout(dp=4, ep=8), Storage(distributed=True))
