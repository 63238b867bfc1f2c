"""Heads of attention out of the projection on a GPU, at the sizes of real layers. Skipped without a CUDA device."""

import pytest
import torch

from megatron_hybrid.kernels.attention import attention
from megatron_hybrid.kernels.columns import split_columns
from megatron_hybrid.kernels.head_columns import HeadColumns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, split_and_rotate_reference, turns_of
from tests.support.rotation_cases import LAYOUTS, TOLERANCE, angles, errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LLAMA = HeadColumns(groups=8, queries=4, keys=1, values=1, width=64, value_width=64)
INTRA = HeadColumns(groups=1, queries=16, keys=4, values=4, width=72, value_width=128)
BEHIND = 4896
"""Columns of the projection of P behind those of attention, zeros included."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"interleaved": True},
        {"channels": 6},
        {"channels": 6, "interleaved": True},
        {"channels": 0},
        {"factor": 1.3, "samples_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [*LAYOUTS.values(), LLAMA, INTRA], ids=[*LAYOUTS, "llama", "intra"])
def test_outputs_and_gradient(heads, case, dtype):
    found = errors(heads, 37, 3, dtype, device="cuda", **case)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("inside", [(16, 24), (3, 0)])
def test_columns_of_a_wider_projection(inside):
    found = errors(INTRA, 33, 2, torch.bfloat16, copy_values=False, inside=inside, device="cuda")
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[torch.bfloat16]} == {}


def real(heads, behind, dtype=torch.bfloat16, tokens=8192, samples=4):
    """The projection, the columns of attention in it, and RoPE's turns."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = tokens, samples, heads.columns + behind
    x = torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_()
    return x, turns_of(angles(tokens, heads.width, False, 5e5).cuda())


def run(x, heads, behind, turns):
    own = split_columns(x, [heads.columns, behind])[0] if behind else x
    return split_and_rotate(own, heads, turns, copy_values=not behind)


@pytest.mark.parametrize(("heads", "behind"), [(LLAMA, 0), (INTRA, BEHIND)], ids=["llama", "intra"])
def test_real_sizes(heads, behind):
    """Against torch's operations in fp32; twice the same bits."""
    x, turns = real(heads, behind)
    found = run(x, heads, behind, turns)
    gradients = [torch.randn_like(t) for t in found]
    dx, again = (torch.autograd.grad(found, x, gradients, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(dx, again)
    exact = x.detach().float().requires_grad_()
    wanted = split_and_rotate_reference(exact[..., : heads.columns].contiguous(), heads, turns)
    (exact_dx,) = torch.autograd.grad(wanted, exact, [g.float() for g in gradients])
    for got, want in zip((*found, dx), (*wanted, exact_dx), strict=True):
        error = ((got.float() - want).abs().max() / want.abs().max()).item()
        assert error < TOLERANCE[torch.bfloat16]


def test_more_elements_than_32_bits_count():
    """The last tokens of a projection of 2.3e9 elements equal those of a short one."""
    tokens, last = 750_000, 64
    x = torch.zeros(tokens, 1, LLAMA.columns, device="cuda", dtype=torch.bfloat16)
    x[-last:] = torch.randn(last, 1, LLAMA.columns, device="cuda")
    assert x.numel() > 2**31
    short = x[-last:].clone().requires_grad_()
    x.requires_grad_()
    angle = angles(tokens, 64, False, 5e5).cuda()
    found, wanted = (
        split_and_rotate(t, LLAMA, turns_of(a)) for t, a in ((x, angle), (short, angle[-last:].contiguous()))
    )
    assert all(torch.equal(a[-last:], b) for a, b in zip(found, wanted, strict=True))
    gradients = [torch.randn_like(t) for t in wanted]
    (wanted_dx,) = torch.autograd.grad(wanted, short, gradients)
    whole = [torch.zeros_like(t) for t in found]
    for to, d in zip(whole, gradients, strict=True):
        to[-last:] = d
    (dx,) = torch.autograd.grad(found, x, whole)
    assert torch.equal(dx[-last:], wanted_dx) and not dx[:-last].any()


@pytest.mark.parametrize(("heads", "behind"), [(LLAMA, 0), (INTRA, BEHIND)], ids=["llama", "intra"])
@pytest.mark.parametrize("window", [None, 512])
def test_nothing_is_copied_between_the_projections(heads, behind, window):
    """From the projection to the output's columns and back: our kernel and attention's, none of torch's."""
    x, turns = real(heads, behind)
    columns = heads.groups * heads.queries * heads.value_width
    dy = torch.randn(8192, 4, columns, device="cuda", dtype=torch.bfloat16)

    def both():
        q, k, v = (t.permute(1, 2, 0, 3) for t in run(x, heads, behind, turns))
        y = attention(q, k, v, heads.width**-0.5, window).permute(2, 0, 1, 3).reshape(8192, 4, -1)
        torch.autograd.grad(y, x, dy)

    both()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("rotary_kernel" in name for name in names) == 2
    # of P, the columns behind those of attention get zeros here, since nothing reads them
    torchs = [name for name in names if "at::native" in name or "DtoD" in name]
    assert len(torchs) <= (1 if behind else 0), torchs
