"""The Triton convolution on a GPU, at the sizes of real layers. Skipped without a CUDA device."""

import pytest
import torch

from megatron_hybrid.kernels.conv import causal_conv1d_fn, document_number
from tests.support.conv_cases import TOLERANCE, columns, documents, errors, results, rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = {
    "plain": {},
    "no-bias-no-silu": {"bias": False, "silu": False},
    "initial": {"initial": True},
    "documents": {"chance": 0.05},
    "documents-initial": {"chance": 0.05, "initial": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "c", "width"), [(1, 256, 4), (3, 48, 3), (77, 2560, 4), (300, 4352, 4), (129, 20, 2)]
)
def test_outputs_and_all_gradients(length, c, width, dtype, case):
    ours, wanted = results(2, length, c, width, dtype, device="cuda", **CASES[case])
    found = errors(ours, wanted)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("b", "s", "c"), [(4, 8192, 4352), (1, 32768, 2560)])
def test_real_sizes_against_torch(b, s, c, packed):
    """causal_conv1d_fn has its own test against the token-by-token reference."""
    from megatron_hybrid.kernels.triton.causal_conv import causal_conv_backward, causal_conv_forward

    x, weight, bias, dy = (
        rounded(*shape, dtype=torch.bfloat16, seed=i).cuda()
        for i, shape in enumerate([(b, s, c), (c, 4), (c,), (b, s, c)])
    )
    ids = documents(b, s, 0.002).cuda() if packed else None
    numbers = None if ids is None else document_number(ids).int()
    x, y, dx = columns(x, 4096, 288), torch.empty_like(x), columns(torch.zeros_like(x), 4096, 288)
    causal_conv_forward(x, weight, bias, numbers, None, True, y)
    again = [causal_conv_backward(dy, x, weight, bias, numbers, None, True, dx) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(g[:2] for g in again), strict=True))
    exact = [t.float().requires_grad_() for t in (x, weight, bias)]
    wanted = causal_conv1d_fn(exact[0].transpose(1, 2), *exact[1:], seq_idx=ids, activation="silu").transpose(1, 2)
    gradients = torch.autograd.grad(wanted, exact, dy.float())
    pairs = zip(("y", "dx", "d_weight", "d_bias"), (y, dx, *again[0][:2]), (wanted.detach(), *gradients), strict=True)
    for name, got, want in pairs:
        error = float((got.float() - want).abs().max() / want.abs().max())
        # sums over all tokens in fp32, in two orders
        assert error <= (1e-4 if name.startswith("d_") else TOLERANCE[torch.bfloat16]), f"{name}: {error:.1e}"


def test_more_elements_than_32_bits_count():
    """The last tokens of a projection of 2.2e9 elements equal those of a short one."""
    from megatron_hybrid.kernels.triton.causal_conv import causal_conv_backward, causal_conv_forward

    s, c, width, tail = 262_144 + 1, 4352, 8480, 300
    wide, d_wide = (torch.zeros(s, 1, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    wide[-tail:].normal_()
    x, dx = (t[:, :, 4096 : 4096 + c].transpose(0, 1) for t in (wide, d_wide))  # [1, s, c]
    y, dy = (torch.zeros(1, s, c, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    dy[:, -tail:].normal_()
    weight = torch.randn(c, 4, dtype=torch.bfloat16, device="cuda")
    causal_conv_forward(x, weight, None, None, None, True, y)
    d_weight, _, _ = causal_conv_backward(dy, x, weight, None, None, None, True, dx)
    short = [t[:, -tail:].contiguous() for t in (x, y, dy, dx)]
    y2, dx2 = torch.empty_like(short[0]), torch.empty_like(short[0])
    causal_conv_forward(short[0], weight, None, None, None, True, y2)
    d_weight2, _, _ = causal_conv_backward(short[2], short[0], weight, None, None, None, True, dx2)
    assert torch.equal(short[1], y2)
    # a token's place among the four of a step decides the order of its sum
    assert (short[3] - dx2).abs().max() <= TOLERANCE[torch.bfloat16] * dx2.abs().max()
    torch.testing.assert_close(d_weight, d_weight2, rtol=1e-4, atol=1e-4)
