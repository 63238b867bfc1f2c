"""Activation memory of stages from that of layers, and what is refused; layers are in test_activations_measured.py."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_hybrid.accounting.activation_settings import NOT_COUNTED, ActivationSettings, Recompute
from megatron_hybrid.accounting.attention_core import core_kernel
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.costs.activations import (
    activation_table,
    embedding_saved,
    head_saved,
    layer_activation_bytes,
    mtp_saved,
    stage_activation_bytes,
    total,
)
from megatron_hybrid.pattern import parse
from tests.costs.test_costs import SMALL

CUDA = ActivationSettings()


def settings(method=None, layers=1, *modules):
    return replace(CUDA, recompute=Recompute(method, layers, frozenset(modules)))


def each(symbol, of=CUDA):
    return layer_activation_bytes(symbol, SMALL, Layout(), of)


def test_a_stage_holds_what_is_in_flight():
    pattern, layout = parse("M" * 8), Layout(pp=4, global_batch=8)
    found = [stage_activation_bytes(pattern, SMALL, layout, CUDA, stage) for stage in range(4)]
    embedding, head = (total(part(SMALL, layout, CUDA)) for part in (embedding_saved, head_saved))
    last = 2 * each("M") + head + 16 * 32 * 2  # and the gradient of the head's weight, in bf16
    assert found == [4 * (2 * each("M") + embedding), 3 * 2 * each("M"), 2 * 2 * each("M"), last]
    few = replace(layout, global_batch=2)
    assert stage_activation_bytes(pattern, SMALL, few, CUDA, 1) == 2 * 2 * each("M")


@pytest.mark.parametrize(
    ("fused", "element", "extra"),
    [
        (False, 2, 10 * 1000 * 2),  # the logits' gradient, which in fp32 takes the place of the softmax
        (False, 4, 0),
        (True, 2, 16 * 1000 * 2),  # the weight's gradient, since there is but one chunk of 10 tokens
        (True, 4, 16 * 1000 * 4),
    ],
)
def test_what_the_loss_makes_takes_memory_of_its_own(fused, element, extra):
    pattern, layout, wide = parse("M"), Layout(), replace(SMALL, padded_vocab=1000)
    of = replace(CUDA, bytes_each=element, fused_loss=fused)
    kept = sum(total(part(wide, layout, of)) for part in (embedding_saved, head_saved)) + each("M", of)
    assert stage_activation_bytes(pattern, wide, layout, of, 0) == kept + extra


def test_a_chunk_of_logits_is_counted():
    """A vocabulary of 2^20: 512 tokens in bf16 are a GiB."""
    wide = replace(SMALL, padded_vocab=2**20, seq_length=2000)
    found = stage_activation_bytes(parse("M"), wide, Layout(), CUDA, 0)
    assert found == sum(total(part(wide, Layout(), CUDA)) for part in (embedding_saved, head_saved)) + (
        layer_activation_bytes("M", wide, Layout(), CUDA) + 512 * 2**20 * 2
    )


def test_an_interleaved_stage_holds_more():
    """(vpp - 1) pp + 2 (pp - 1) + 1 forward passes of one layer each come before stage 0's first backward pass."""
    pattern, layout = parse("M|M|M|M"), Layout(pp=2, vpp=2, global_batch=8)
    embedding = total(embedding_saved(SMALL, layout, CUDA))
    found = stage_activation_bytes(pattern, SMALL, layout, CUDA, 0)
    # 5 passes: micro-batches 0, 1 in both segments, 2 in segment 0; two passes later 3 stands there for 0 in segment 1
    assert found == 5 * each("M") + 4 * embedding


def test_full_recomputation_keeps_inputs_and_one_group():
    pattern, layout = parse("M-*-"), Layout()
    beside = total(embedding_saved(SMALL, layout, CUDA)) + total(head_saved(SMALL, layout, CUDA))
    one_input = 10 * 16 * 2
    uniform = stage_activation_bytes(pattern, SMALL, layout, settings("uniform", 3), 0)
    assert uniform == beside + 2 * one_input + each("M") + each("-") + each("*")
    block = stage_activation_bytes(pattern, SMALL, layout, settings("block", 2), 0)
    assert block == beside + 2 * one_input + each("*") + each("-") + max(each("M"), each("-"))


def test_selective_recomputation_brings_back_one_layer():
    pattern, layout, mlp = parse("M--"), Layout(), settings(None, 1, "mlp")
    beside = total(embedding_saved(SMALL, layout, CUDA)) + total(head_saved(SMALL, layout, CUDA))
    found = stage_activation_bytes(pattern, SMALL, layout, mlp, 0)
    assert each("-", of=mlp) < each("-")
    assert found == beside + each("M") + each("-", of=mlp) + each("-")


# What M is without under --hybrid-recompute ssm, with mamba_ssm's kernels: z x B C dt, samples first, its output,
# its norm's input and 1 / rms
SCAN_AGAIN = 10 * (61 * 2 + 24 * 2 + 24 * 2 + 4)


def test_recomputation_of_a_scan_that_keeps_its_input_brings_back_the_norm_alone():
    pattern, layout, of = parse("M|M"), Layout(pp=2), settings(None, 1, "ssm")
    norm = 10 * (24 * 2 + 4)
    assert each("M", of) + norm == each("M")
    found = stage_activation_bytes(pattern, SMALL, layout, of, 0)
    assert found == total(embedding_saved(SMALL, layout, of)) + each("M", of) + norm


@pytest.mark.parametrize(
    ("text", "method", "layers", "kept", "after", "again"),
    [
        # the second segment's group is the largest, and one of its scans runs again within it
        ("M-|M-|M-|MM", "uniform", 2, "", "", "MM"),
        # the first prediction head is larger still
        ("M-|M-|M-|MM/*M*", "uniform", 2, "", "", None),
        # a scan behind the recomputed layer takes more than this layer
        ("-*|-*|-*|-M", "block", 1, "*", "M", ""),
    ],
)
def test_full_recomputation_of_segments_whose_scans_run_again(text, method, layers, kept, after, again):
    """The last stage: two micro-batches wait behind its first segment while one is in its second."""
    pattern, layout = parse(text), Layout(pp=2, vpp=2, global_batch=2)
    of = replace(settings(method, layers, "ssm"), ssm_kernels="mamba_ssm")
    one_input = 10 * 16 * 2
    first, second = (one_input + sum(each(symbol, of) for symbol in symbols) for symbols in (kept, after))
    second += total(head_saved(SMALL, layout, of))
    alive = SCAN_AGAIN + sum(each(symbol, of) for symbol in again or "")
    if (
        again is None
    ):  # three norms, state and token joined, layers; it keeps state and token, its loss the stack's output
        alive = 10 * (3 * (16 * 2 + 4) + 32 * 2) + 2 * each("*", of) + each("M", of)
        second += total(mtp_saved(SMALL, layout, of)) + 3 * one_input
    assert stage_activation_bytes(pattern, SMALL, layout, of, 1) == 2 * first + second + alive


def test_dense_layer_written_out():
    """h = 16, f = 20, 10 tokens: norm in fp32 on CPU, then SwiGLU in five pieces; fused on CUDA in three."""
    assert each("-") == 10 * (16 * 2 + 4 + 16 * 2 + 2 * 20 * 2 + 20 * 2)
    cpu = replace(CUDA, device="cpu", backend="torch", bytes_each=4)
    assert each("-", of=cpu) == 10 * (16 * 4 + 4 + 16 * 4 + 16 * 4 + 5 * 20 * 4)


def test_mamba_layer_on_cuda_written_out():
    """z x B C dt = 61, padded to 64, and with mamba_ssm's function a copy of 61 and its out_x = 24; norm, projection.

    The input projection's weight is kept with its padding.
    """
    rest = 10 * (16 * 2 + 4 + 16 * 2 + 24 * 2 + 4 + 24 * 2) + 64 * 16 * 2
    assert each("M") == rest + 10 * 64 * 2
    assert each("M", of=replace(CUDA, ssm_kernels="mamba_ssm")) == rest + 10 * (61 * 2 + 24 * 2)


# Each layer's own norm on CUDA: input, 1 / rms, output
NORM = 16 * 2 + 4 + 16 * 2


def test_gated_delta_net_on_cuda_written_out():
    """flash-linear-attention: q = k = 6, v = 20 channels, 2 key and 4 value heads; 3 tokens more in the convolution."""
    projected = 32 * 2 + 12 * 2 + 2 * 2 * 2 + 2 * 4 * 4 + 4 * 2
    rule = 2 * 4 * 3 * 2 + 20 * 2 + 4 * 4 + 4 * 64 * 2
    gated_norm = 20 * 2 + 4 * 4 + 20 * (2 + 4 + 4) + 20 * 2
    weight = 64 * 16 * 2  # of 60 rows
    assert each("G") == 10 * (NORM + projected + rule + gated_norm) + (10 + 3) * 32 * 2 + weight


def test_window_on_cuda_written_out():
    """RoPE's table, q, k and v, log-sum-exp of 4 heads, FlexAttention's output, and the same in the model's order."""
    assert each("W") == 10 * (NORM + 6 * 4 + 24 * 2 + 2 * 12 * 2 + 4 * 4 + 24 * 2 + 24 * 2)


def test_attention_of_context_parallel_ranks_on_cuda_written_out():
    """5 tokens a rank: Transformer Engine keeps the rank's q, k and v; ours gathers k and v of all ranks."""
    te, ours = (
        layer_activation_bytes("*", SMALL, Layout(cp=2), replace(CUDA, backend=backend)) for backend in ("te", "torch")
    )
    common = NORM + 6 * 4 + 24 * 2 + 4 * 4 + 24 * 2  # RoPE's table, q, log-sum-exp, output
    assert te == 5 * (common + 2 * 12 * 2)
    assert ours == 5 * (common + 24 * 2) + 10 * 2 * 12 * 2


def test_key_heads_of_fewer_than_ranks_are_split_upstreams_way():
    """2 key heads on 4 ranks, which gather the projection of all; RoPE by torch: cosines and sines of q and k each."""
    found = layer_activation_bytes("*", SMALL, Layout(tp=4), replace(CUDA, backend="torch"))
    assert found == 10 * (NORM + 4 * 6 * 2 + 48 * 2 + 6 * 2 + 6 * 2 + 1 * 4 + 6 * 2)


def test_intra_layer_hybrid_with_a_window_on_cuda_written_out():
    """q = 12 in 2 heads, k = v = 6, z x B C dt = 44, x = 16 in 2 heads.

    mamba_ssm's kernels keep a copy of the latter, and out_x; ours keep columns of the whole projection, which has 68
    and 4 of zeros.
    """
    windowed = replace(SMALL, own=(("P", replace(SMALL.of("P"), qk_dim=12, window=4)),))
    attention = 6 * 4 + 2 * 4 + 12 * 2 + 6 * 2 + 6 * 2 + 12 * 2
    fusion = (12 * 2 + 2 * 4) + (16 * 2 + 2 * 4) + (12 + 16) * 2
    weight = 72 * 16 * 2
    for kernels, scan in {"mamba_ssm": 44 * 2 + 16 * 2, "triton": 72 * 2}.items():
        found = layer_activation_bytes("P", windowed, Layout(), replace(CUDA, ssm_kernels=kernels))
        assert found == 10 * (NORM + attention + scan + fusion) + weight


EIGHTS = replace(SMALL, head_dim=8)
"""Heads of which all channels are multiples of 8: 4 of queries, 2 of keys; window of 4 with 1 sink."""


def test_window_of_the_triton_kernel_written_out():
    """RoPE's table, q, k and v, log-sum-exp, and the output in the model's order."""
    found = layer_activation_bytes("W", EIGHTS, Layout(), CUDA)
    assert found == 10 * (NORM + 8 * 4 + 32 * 2 + 16 * 2 + 16 * 2 + 4 * 4 + 32 * 2)
    flex = layer_activation_bytes("W", EIGHTS, Layout(), replace(CUDA, attention_kernel="torch"))
    assert flex - found == 10 * 32 * 2  # another output


@pytest.mark.parametrize("window", [None, 4])
def test_unequal_heads_are_padded_for_torch_alone(window):
    """q = 16 in 2 heads, k = 8, v = 16 in one, output 32; the scan keeps the projection, and v stays a view of it."""
    design = replace(SMALL.of("P"), qk_dim=16, value_dim=32, window=window)
    sizes = replace(SMALL, own=(("P", design),))
    cuda = replace(CUDA, backend="torch")
    found, padded = (
        layer_activation_bytes("P", sizes, Layout(), replace(cuda, attention_kernel=name)) for name in ("auto", "torch")
    )
    padding = 2 * 16 + 2 * 16 - 16 - 8 + 32  # q, k and v of 16 a head, and the output cut out for its norm
    copies = 16 + 32  # FlexAttention: v, and a copy of the output
    assert padded - found == 10 * 2 * (copies if window else padding)


def test_attention_grows_with_the_square_on_cpu_alone():
    cpu = replace(CUDA, device="cpu", backend="torch")
    windowed = {"sizes": replace(SMALL, seq_length=64)}, {"sizes": replace(SMALL, seq_length=128)}
    on_cpu = [layer_activation_bytes("W", layout=Layout(), settings=cpu, **one) for one in windowed]
    on_cuda = [layer_activation_bytes("W", layout=Layout(), settings=CUDA, **one) for one in windowed]
    assert on_cpu[1] - 2 * on_cpu[0] == 2 * (128**2 - 2 * 64**2)
    assert on_cuda[1] == 2 * on_cuda[0]


def test_a_table_has_each_part_once():
    found = activation_table(parse("M-M-/*-"), SMALL, Layout(), CUDA)
    assert list(found) == ["embedding", "M", "-", "*", "head", "mtp"]
    assert found["mtp"] > found["head"] + found["*"] + found["-"] - 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "layernorm is not counted"),
        ({"recompute_granularity": "full"}, "uniform or block"),
        ({"cuda_graph_impl": "local"}, "memory pools"),
        ({"microbatch_group_size_per_vp_stage": 4, "pipeline_model_parallel_size": 2}, "-stage 4: .* stages, 2"),
        ({"device": "cpu", "reset_attention_mask": True}, "packed documents"),
        *(({name: True}, f"--{name.replace('_', '-')} means") for name in NOT_COUNTED),
    ],
)
def test_what_is_not_counted_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        ActivationSettings.from_args(SimpleNamespace(hybrid_layer_pattern="*E", **flags))


def test_dropout_of_scores_on_cpu_is_refused_by_layers_with_attention():
    dropped = ActivationSettings.from_args(SimpleNamespace(device="cpu", attention_dropout=0.1))
    for symbol in "*WP":
        with pytest.raises(ValueError, match="--attention-dropout 0.1 on CPU"):
            each(symbol, dropped)
        each(symbol, replace(dropped, device="cuda"))
    each("M", dropped)


@pytest.mark.parametrize("dispatcher", ["allgather", "flex"])
def test_dispatchers_other_than_all_to_alls_are_refused_where_there_are_experts(dispatcher):
    for settings in (ActivationSettings, CommunicationSettings):
        with pytest.raises(ValueError, match=f"{dispatcher}: .* Use alltoall"):
            settings.from_args(SimpleNamespace(num_experts=4, moe_token_dispatcher_type=dispatcher))
        settings.from_args(SimpleNamespace(num_experts=None, moe_token_dispatcher_type=dispatcher))
        settings.from_args(SimpleNamespace(num_experts=4, moe_token_dispatcher_type="alltoall"))


def test_settings_that_are_off_are_no_reason_to_refuse():
    off = {name: value for name in NOT_COUNTED for value in (None, False)} | {"cuda_graph_impl": "none"}
    group = {"microbatch_group_size_per_vp_stage": 2, "pipeline_model_parallel_size": 2}
    assert ActivationSettings.from_args(SimpleNamespace(**off, **group, hidden_dropout=0, bf16=True)).bytes_each == 2


def test_settings_of_arguments():
    args = SimpleNamespace(
        bf16=True,
        device="cuda",
        backend="torch",
        position_embedding_type="rope",
        hidden_dropout=0.0,
        hybrid_recompute=["ssm"],
        recompute_granularity="selective",
    )
    found = ActivationSettings.from_args(args)
    assert (found.bytes_each, found.backend, found.rope, found.dropout) == (2, "torch", True, False)
    assert found.recompute.modules == {"ssm", "core_attn"}
    assert (found.ssm_kernels, found.rotary_percent, found.fused_activation) == ("triton", 1, False)
    default = ActivationSettings.from_args(SimpleNamespace(moe_layer_recompute=True, ssm_kernels="torch", swiglu=True))
    assert (default.bytes_each, default.device, default.backend) == (4, "cuda", "te")
    assert (default.dropout, default.ssm_kernels, default.fused_activation) == (True, "torch", True)
    assert default.recompute.modules == {"moe"}
    full = Recompute.from_args(
        SimpleNamespace(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    )
    assert (full.method, full.layers, full.modules) == ("block", 3, frozenset())


def test_kernels_are_those_that_run():
    """The core's choice on the GPU (kernels/attention.py) and that which costs count, in all cases that differ."""
    import torch

    from megatron_hybrid.kernels.attention import kernel_for

    dtypes = {2: torch.bfloat16, 4: torch.float32}
    found = set()
    for prefer, masked, chunk, widths, each_, capability, dropout in itertools.product(
        ("auto", "triton", "cudnn", "torch"),
        (False, True),
        (False, True),
        ((64, 64), (72, 128), (60, 64), (128, 256), (264, 264)),
        (2, 4),
        ((7, 5), (8, 0), (9, 0), (10, 0)),
        (0.0, 0.1),
    ):
        of = replace(CUDA, attention_kernel=prefer, bytes_each=each_, capability=capability, attention_dropout=dropout)
        counted = core_kernel(of, widths, masked, chunk)
        call = {"masked": masked, "chunk": chunk, "widths": widths, "dtype": dtypes[each_], "dropout": dropout}
        assert counted == kernel_for(prefer, capability=capability, **call), call
        found.add(counted)
    assert found == {"triton", "cudnn", "sdpa", "flex"}
