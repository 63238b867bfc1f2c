"""The torch backend's CUDA paths against float64 on the CPU. Skipped without a CUDA device."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hybrid.kernels.attention import attention, attention_reference
from megatron_hybrid.kernels.conv import causal_conv1d_fn, causal_conv1d_reference
from megatron_hybrid.kernels.ssd import ssd_chunk_scan, ssd_recurrence
from tests.support import expert_pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# bf16 keeps 8 bits: a relative error of 2^-8 = 4e-3 for each rounding of inputs, weights and output, a few of which
# add up. It is taken relative to the largest entry, since single entries can cancel to nearly nothing.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}  # fp32 products may use TF32 (10 bits) inside fused kernels


def compare(fast, reference, inputs, dtype):
    """Outputs and the gradients of all inputs."""
    generator = torch.Generator().manual_seed(1)
    ours = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    exact = [x.to(dtype).double().requires_grad_() for x in inputs]
    out, wanted = fast(*ours), reference(*exact)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.double)
    out.backward(upstream.to("cuda", out.dtype))
    wanted.backward(upstream.to(dtype).double())
    pairs = [
        ("output", out, wanted),
        *((f"gradient {i}", a.grad, b.grad) for i, (a, b) in enumerate(zip(ours, exact, strict=True))),
    ]
    for name, found, right in pairs:
        error = (found.cpu().double() - right).abs().max() / right.abs().max().clamp_min(1e-6)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [63, 500])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (100, 16)])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (64, 128), (72, 128), (128, 64)])
def test_attention(dtype, length, window, sinks, d, dv):
    if window and (d == 72 or dtype == torch.float32):
        pytest.skip("FlexAttention is for the head sizes of W layers, in training precision")
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, length, d), (2, 2, length, d), (2, 2, length, dv)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    compare(
        lambda q, k, v: attention(q, k, v, d**-0.5, window, sinks),
        lambda q, k, v: attention_reference(q, k, v, d**-0.5, window, sinks),
        inputs,
        dtype,
    )


def test_attention_of_a_later_chunk_of_the_sequence():
    q, k, v = torch.randn(1, 4, 128, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    for window in (None, 100):
        compare(
            lambda q, k, v, w=window: attention(q, k, v, 0.125, w, 8, offset=256),
            lambda q, k, v, w=window: attention_reference(q, k[:, :, :384], v[:, :, :384], 0.125, w, 8, offset=256),
            [q, k, v],
            torch.bfloat16,
        )


def make_documents(length, batch=2):
    """Ids of documents of all lengths up to a few hundred, ending anywhere; int32 [b, s]."""
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.01
    return (ends.cumsum(1) - ends.int()).int()


@pytest.mark.parametrize("length", [63, 500])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (100, 16)])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (64, 128), (72, 128), (128, 64), (40, 40)])
@pytest.mark.parametrize("offset", [0, 21])
def test_attention_inside_documents(length, window, sinks, d, dv, offset):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, length - offset, d), (2, 2, length, d), (2, 2, length, dv)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    ids = make_documents(length)
    on_cuda = ids.cuda()
    compare(
        lambda q, k, v: attention(q, k, v, d**-0.5, window, sinks, offset, documents=on_cuda),
        lambda q, k, v: attention_reference(q, k, v, d**-0.5, window, sinks, offset, documents=ids),
        inputs,
        torch.bfloat16,
    )


def test_new_documents_compile_nothing():
    """Block masks are made for each micro-batch: the kernels behind them must serve all."""
    q, k, v = (torch.randn(2, h, 512, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))

    def run(seed):
        ids = make_documents(512).cuda() + (torch.arange(512, device="cuda") > 100 * seed)
        for window in (None, 100):
            attention(q, k, v, 0.125, window, 16, documents=ids)

    run(1)
    run(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3)


def test_attention_does_not_store_the_scores():
    length = 16384
    q = torch.randn(1, 8, length, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(1, 2, length, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    v = torch.randn(1, 2, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for window, documents in ((None, None), (512, None), (None, make_documents(length, 1).cuda())):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, 72**-0.5, window, 64, documents=documents).sum().backward()
        scores = 8 * length * length * 2
        assert torch.cuda.max_memory_allocated() - before < scores / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "chunk"), [(63, 64), (500, 128)])
def test_scan(dtype, length, chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 4, 32, generator=generator)
    dt = torch.rand(2, length, 4, generator=generator) * 0.1
    b, c = (torch.randn(2, length, 2, 16, generator=generator) for _ in range(2))
    a = -torch.rand(4, generator=generator) - 0.1
    compare(
        lambda x, dt, b, c: ssd_chunk_scan(x, dt, a.cuda(), b, c, chunk),
        lambda x, dt, b, c: ssd_recurrence(x, dt, a.double(), b, c),
        [x, dt, b, c],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution(dtype):
    inputs = [torch.randn(2, 48, 77), torch.randn(48, 4) / 2, torch.randn(48)]
    compare(
        lambda x, w, bias: causal_conv1d_fn(x, w, bias, activation="silu"),
        lambda x, w, bias: causal_conv1d_reference(x, w, bias, activation="silu"),
        inputs,
        dtype,
    )


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("counts", [[5, 0, 33, 1], [0, 0, 3, 0], [1000, 0, 24, 0, 777, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="experts are grouped from sm90 on"
)
def test_grouped_experts(process_group, counts, fused):
    grouped, errors = expert_pairs.errors(counts, "cuda", bias_activation_fusion=fused)
    assert grouped
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE[torch.bfloat16]} == {}


@pytest.mark.parametrize(
    ("counts", "settings"),
    [
        ([5, 0, 33], {"params_dtype": torch.float32}),
        ([5, 0, 33], {"moe_ffn_hidden_size": 36}),
        ([5, 0, 33], {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True}),
        ([0, 0, 0], {}),
        ([7], {}),
    ],
    ids=["fp32", "unaligned", "scaled-inputs", "no-tokens", "one-expert"],
)
def test_experts_that_grouped_products_do_not_take_are_looped_over(process_group, counts, settings):
    grouped, errors = expert_pairs.errors(counts, "cuda", **settings)
    assert not grouped
    assert set(errors.values()) == {0.0}  # upstream's operations, on the same numbers


# P layers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intra_layer():
    """``intra_layer(recompute, dropout, **axes)``: a P mixer in bf16, always of the same weights."""
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_hybrid.layers.attention.module import RoPE
    from megatron_hybrid.layers.intra.design import design
    from megatron_hybrid.layers.intra.module import IntraHybrid, IntraSubmodules
    from megatron_hybrid.model.loss_head import HybridLossModel
    from megatron_hybrid.model.stack import HybridLayerStack
    from megatron_hybrid.patches import upstream

    upstream.prepare("cuda", HybridLayerStack, HybridLossModel)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()

    def make(recompute=(), dropout=0.1, **axes):
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        sizes = {"hidden_size": 512, "num_attention_heads": 8, "mamba_head_dim": 64, "mamba_num_groups": 1}
        flags = SimpleNamespace(**sizes, **axes)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=512,
            num_attention_heads=8,
            params_dtype=torch.bfloat16,
            bf16=True,
            layernorm_epsilon=1e-5,
            attention_dropout=dropout,
            gradient_accumulation_fusion=False,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        parts = IntraSubmodules(ColumnParallelLinear, RowParallelLinear)
        layer = IntraHybrid(config, parts, 1, groups, design(flags), RoPE(), recompute=recompute)
        return layer.bfloat16().train()

    yield make
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gradients_of(layer):
    """Output, and gradients of the input and of all weights."""
    torch.manual_seed(2)
    x = torch.randn(1024, 1, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, _ = layer(x)
    y.backward(y.detach())
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("recompute", [("intra",), ("ssm",)])
@pytest.mark.parametrize("preset", ["paper", "hymba", "diff-mamba"])
def test_recomputation_changes_no_bit(intra_layer, preset, recompute):
    """All kernels of the torch backend add in a fixed order in deterministic mode, so that nothing may differ."""
    torch.use_deterministic_algorithms(True)
    try:
        both = [gradients_of(intra_layer(parts, intra_preset=preset)) for parts in ((), recompute)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert all(torch.isfinite(t).all() for t in both[0])


def test_a_layer_is_captured_in_a_cuda_graph(intra_layer):
    layer, plain = (intra_layer(dropout=0.0) for _ in range(2))  # a graph's random numbers are not the plain layer's
    x = torch.randn(256, 1, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(lambda t: layer(t)[0], (x,))
    for _ in range(2):
        inputs = torch.randn_like(x).requires_grad_()
        same = inputs.detach().clone().requires_grad_()
        y, wanted = graphed(inputs), plain(same)[0]
        y.backward(wanted.detach())
        wanted.backward(wanted.detach())
        assert torch.equal(y, wanted)
        torch.testing.assert_close(inputs.grad, same.grad)
