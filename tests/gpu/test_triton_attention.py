"""The Triton attention on a GPU, at the sizes of real layers, and the choice of kernels. Skipped without CUDA."""

import pytest
import torch

from megatron_hybrid.kernels.attention import attention
from tests.support.attention_cases import TOLERANCE, errors, ids, inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DOCUMENTS = {"one": None, "many": ids([1, 127, 700, 3, 1, 168], [1000], [500, 12, 488])}


def check(tensors, *rule, documents=None):
    found = errors(tensors, *rule, documents=documents)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[tensors[0].dtype]} == {}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (1, 1), (100, 16), (512, 64), (128, 200)])
@pytest.mark.parametrize("widths", [(64, 64), (72, 128)], ids=str)
def test_output_and_all_gradients(widths, window, sinks, documents):
    b = 3 if documents == "many" else 1
    check(inputs(b, (8, 2), 1000, 0, widths, torch.bfloat16, "cuda"), window, sinks, 0, documents=DOCUMENTS[documents])


@pytest.mark.parametrize("widths", [(128, 128), (64, 128), (40, 24), (128, 64), (256, 256), (8, 16)], ids=str)
def test_other_widths(widths):
    check(inputs(3, (8, 2), 1000, 0, widths, torch.bfloat16, "cuda"), 100, 16, 0, documents=DOCUMENTS["many"])


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (100, 16)])
@pytest.mark.parametrize(("sq", "offset"), [(1, 999), (500, 500), (256, 256), (77, 21)])
def test_a_part_of_the_queries(sq, offset, window, sinks, documents):
    tensors = inputs(3, (8, 2), sq, offset, (72, 128), torch.bfloat16, "cuda")
    check(tensors, window, sinks, offset, documents=DOCUMENTS[documents])


@pytest.mark.parametrize("heads", [(6, 2), (16, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 129])
def test_heads_and_lengths(length, heads):
    check(inputs(2, heads, length, 0, (64, 64), torch.float16, "cuda"), 50, 5, 0)


@pytest.mark.parametrize("rule", [(None, 0, 0), (512, 64, 0)], ids=str)
def test_two_backward_passes_agree_in_every_bit(rule):
    from megatron_hybrid.kernels.triton.window_attention import Rule, window_attention

    tensors = [t.requires_grad_() for t in inputs(2, (32, 8), 4096, 0, (64, 64), torch.bfloat16, "cuda")]
    dy = torch.randn(2, 32, 4096, 64, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(3):
        out = window_attention(*tensors, Rule(0.125, *rule))
        runs.append([out, *torch.autograd.grad(out, tensors, dy)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("prefer", ["auto", "triton", "cudnn", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(64, 64), (72, 128), (60, 64)], ids=str)
@pytest.mark.parametrize("offset", [0, 300])
def test_every_kernel_gives_the_same(prefer, dtype, widths, offset):
    """Full attention; fp32 and widths that are no multiples of 8 are served too."""
    from megatron_hybrid.kernels.attention import attention_reference

    tensors = inputs(2, (8, 2), 600, offset, widths, dtype, "cuda")
    ours = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn(2, 8, 600, widths[1], device="cuda", dtype=dtype)
    out = attention(*ours, 0.1, offset=offset, prefer=prefer)
    wanted = attention_reference(*exact, 0.1, offset=offset)
    found = out, *torch.autograd.grad(out, ours, dy)
    right = wanted, *torch.autograd.grad(wanted, exact, dy.double())
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-3  # torch's products may use TF32
    for got, want in zip(found, right, strict=True):
        assert (got.double() - want).abs().max() / want.abs().max() <= limit


def test_unequal_head_sizes_are_not_padded():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuDNN is taken for unequal head sizes on Hopper")
    from torch.profiler import ProfilerActivity, profile

    tensors = [t.requires_grad_() for t in inputs(2, (16, 4), 2048, 0, (72, 128), torch.bfloat16, "cuda")]
    dy = torch.randn(2, 16, 2048, 128, device="cuda", dtype=torch.bfloat16)
    attention(*tensors, 0.1).backward(dy)  # builds cuDNN's plans
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        attention(*tensors, 0.1).backward(dy)
    names = {event.name for event in profiled.events()}
    assert "aten::_scaled_dot_product_cudnn_attention" in names
    assert not names & {"aten::constant_pad_nd", "aten::pad"}


def test_long_samples():
    """The last queries of a long sample equal the same queries as a part, full and windowed."""
    from megatron_hybrid.kernels.triton.window_attention import Rule, window_attention

    length, last = 131072, 256
    q, k, v = inputs(1, (8, 2), length, 0, (64, 64), torch.bfloat16, "cuda")
    for window, sinks in ((None, 0), (512, 64)):
        whole = window_attention(q, k, v, Rule(0.125, window, sinks, 0))[:, :, -last:]
        part = window_attention(q[:, :, -last:], k, v, Rule(0.125, window, sinks, length - last))
        torch.testing.assert_close(whole, part, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_flex_attention_is_the_fallback(documents, dtype):
    from megatron_hybrid.kernels.attention import attention_reference

    b = 3 if documents == "many" else 1
    ids_ = DOCUMENTS[documents] if documents == "one" else DOCUMENTS[documents].cuda()
    tensors = inputs(b, (8, 2), 1000, 0, (64, 64), dtype, "cuda")
    with torch.no_grad():
        found = attention(*tensors, 0.125, 100, 16, documents=ids_, prefer="torch")
        wanted = attention_reference(*(t.double() for t in tensors), 0.125, 100, 16, documents=ids_)
    assert (found.double() - wanted).abs().max() / wanted.abs().max() <= 2e-2
