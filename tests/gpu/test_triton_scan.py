"""The Triton scan and the core of a Mamba-2 layer on a GPU, at real sizes. Skipped without a CUDA device."""

import pytest
import torch

from megatron_hybrid.kernels.triton import ssd_scan as scan
from megatron_hybrid.kernels.triton.mamba import mamba_split_conv_scan
from tests.support.scan_cases import assert_close, core_results, scan_results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DOCUMENTS = {"packed": True, "initial": True}
UNGATED = {"z": False, "D": False}


# Each line compiles six kernels, so options are spread over the sizes.
@pytest.mark.parametrize(
    ("length", "h", "p", "g", "n", "dtype", "case"),
    [
        (300, 4, 128, 1, 128, BF16, {}),
        (300, 4, 128, 1, 128, FP32, DOCUMENTS),
        (515, 4, 64, 2, 64, BF16, DOCUMENTS),
        (515, 4, 64, 2, 64, FP32, UNGATED),
        (1, 4, 64, 1, 128, BF16, {}),
        (200, 3, 192, 1, 256, BF16, DOCUMENTS),
        (130, 2, 48, 1, 40, FP16, UNGATED),
        (256, 4, 32, 1, 32, BF16, {}),
        (192, 8, 16, 2, 16, BF16, DOCUMENTS),
        (192, 8, 16, 2, 16, FP32, {}),
        (2500, 1, 64, 1, 64, BF16, DOCUMENTS),
    ],
)
def test_scan(length, h, p, g, n, dtype, case):
    assert_close(scan_results(2, length, h, p, g, n, dtype, device="cuda", **case), dtype)


@pytest.mark.parametrize(
    ("length", "h", "p", "g", "n", "dtype", "case"),
    [(515, 8, 128, 1, 128, BF16, DOCUMENTS), (128, 6, 64, 2, 64, FP32, {}), (128, 6, 64, 2, 64, FP16, {})],
)
def test_core(length, h, p, g, n, dtype, case):
    assert_close(core_results(2, length, h, p, g, n, dtype, device="cuda", **case), dtype)


def one_billion(s: int, b: int, heads: int = 32, seed: int = 0) -> list[torch.Tensor]:
    """Arguments of the core of M at 1B: heads of 128, state 128, one group."""
    torch.manual_seed(seed)
    inner, channels = heads * 128, heads * 128 + 256
    return [
        torch.randn(s, b, inner + channels + heads, device="cuda", dtype=torch.bfloat16).requires_grad_(),
        (torch.randn(channels, 4, device="cuda") / 2).bfloat16().requires_grad_(),
        torch.randn(channels, device="cuda").bfloat16().requires_grad_(),
        (torch.randn(heads, device="cuda") - 3).requires_grad_(),
        (-torch.rand(heads, device="cuda") - 0.01).requires_grad_(),
        torch.randn(heads, device="cuda").requires_grad_(),
    ]


def test_bitwise_identical_from_run_to_run():
    arguments = one_billion(8192, 2)
    results = []
    for _ in range(3):
        y = mamba_split_conv_scan(*arguments, 128, 1)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), arguments)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_offsets_beyond_31_bits():
    """The last sample of 9 x 32,768 x 8,480 elements, of which 2^31 end in the eighth, as if it stood alone."""
    arguments = one_billion(32768, 9)
    y = mamba_split_conv_scan(*arguments, 128, 1)
    (d_all,) = torch.autograd.grad(y[:, -1].float().square().sum(), arguments[:1])
    alone = [arguments[0][:, -1:].detach().contiguous().requires_grad_(), *arguments[1:]]
    expected = mamba_split_conv_scan(*alone, 128, 1)
    (d_expected,) = torch.autograd.grad(expected.float().square().sum(), alone[:1])
    # not to the bit: heads are split over other numbers of programs
    assert (y[:, -1:] - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (d_all[:, -1:] - d_expected).abs().max() <= 2e-2 * d_expected.abs().max()
    assert not d_all[:, :-1].any()


def test_no_tensor_of_the_layers_width_is_copied():
    """Beside its result and the gradient, the core allocates convolved channels, their gradient, dy and states."""
    arguments = one_billion(8192, 4)
    tokens = 8192 * 4
    mamba_split_conv_scan(*arguments, 128, 1).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = mamba_split_conv_scan(*arguments, 128, 1)
    assert torch.cuda.memory_allocated() - before <= tokens * 4096 * 2 * 1.01  # y alone is kept
    dy = torch.ones_like(y)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(y, arguments, dy)
    peak = torch.cuda.max_memory_allocated() - before
    states = tokens // scan.CHUNK * 32 * 128 * 128 * 2
    small = tokens * (2 * 128 + 8 * 32 * 2 + scan.CHUNK) * 4  # gradients of B, C, steps and scores in fp32
    assert peak <= tokens * (8480 + 2 * 4352 + 4096) * 2 + 2 * states + 1.3 * small
