"""Products, norms and fusion of a block on CUDA against float64 on the CPU. Skipped without a CUDA device."""

import pytest
import torch

from megatron_hybrid.kernels.weight_gradient import accumulate
from tests.support.norm_cases import TOLERANCE, fusion_errors, norm_errors, random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def check(found, tolerance):
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [{}, {"residual": False}, {"weight": False}, {"columns": 6}], ids=str)
@pytest.mark.parametrize(
    ("s", "b", "groups", "width"),
    [(1, 1, 1, 64), (1000, 3, 1, 2048), (777, 2, 18, 128), (300, 1, 1, 4096), (50, 2, 1, 8192), (65, 1, 3, 100)],
)
def test_norm(s, b, groups, width, dtype, case):
    # sums over 3,000 rows in fp32, in an order of their own: 3e-5
    check(norm_errors(s, b, groups, width, dtype, device="cuda", **case), max(TOLERANCE[dtype], 3e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_factors", [(True, True), (False, True)])
@pytest.mark.parametrize(
    ("s", "b", "widths", "groups", "fusion"),
    [
        (999, 2, (2048, 2304), (16, 18), "concat"),
        (513, 1, (2048, 2048), (16, 16), "add"),
        (513, 3, (2048, 2048), (1, 1), "diff"),
        (200, 2, (4096, 4096), None, "add"),
        (65, 1, (300, 300), (3, 3), "diff"),
    ],
)
def test_fusion(s, b, widths, groups, fusion, with_factors, dtype):
    found = fusion_errors(s, b, widths, groups, fusion, dtype, device="cuda", with_factors=with_factors)
    check(found, max(TOLERANCE[dtype], 3e-5))
    moved = {"columns": 4, "transposed": True}
    found = fusion_errors(s, b, widths, groups, fusion, dtype, device="cuda", with_factors=with_factors, **moved)
    check(found, max(TOLERANCE[dtype], 3e-5))


def test_norms_and_fusion_are_the_same_bits_every_time():
    from megatron_hybrid.kernels.branches import fuse

    xs = [random(2000, 2, 2048, dtype=torch.bfloat16, seed=i, device="cuda").requires_grad_() for i in range(2)]
    factors = [random(2048, dtype=torch.bfloat16, seed=2 + i, device="cuda").requires_grad_() for i in range(2)]
    for fusion in ("diff", "concat"):
        first = None
        for _ in range(3):
            y = fuse(tuple(xs), tuple(factors), (16, 16), 1e-5, fusion)
            found = [y, *torch.autograd.grad(y, [*xs, *factors], torch.ones_like(y))]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("n", [6834, 6840, 3])
@pytest.mark.parametrize(("total_dtype", "dtype"), [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16",) * 2])
def test_gradient_is_added_inside_its_product(n, total_dtype, dtype):
    """Also of a padded gradient, whose last columns are left out."""
    total_dtype, dtype = getattr(torch, total_dtype), getattr(torch, dtype)
    t, h, padded = 2048, 256, n + -n % 8
    dy, x = (random(t, w, dtype=dtype, seed=i, device="cuda") for i, w in enumerate((padded, h)))
    total = random(n, h, dtype=total_dtype, seed=2, device="cuda")
    wanted = total.double() + dy[:, :n].double().t() @ x.double()
    where = total.data_ptr()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    accumulate(total, dy, x)
    assert total.data_ptr() == where
    # no tensor for the product, but a workspace of the library
    assert torch.cuda.max_memory_allocated() - before < max(total.numel() * 2, 2**26)
    # fp32 totals: sums of 2,048 terms, in fp32 on the CPU's bits; with fp32 inputs perhaps by TF32 (10 bits)
    tolerance = {"float32": 1e-5 if dtype != torch.float32 else 2e-3, "bfloat16": 8e-3}[str(total_dtype).split(".")[1]]
    assert (total.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_gradient_of_bf16_is_not_rounded_before_it_is_added():
    """A product that bf16 would round to nothing beside what is there: 1 + 2^-10 stays."""
    total = torch.full((8, 8), 1.0, device="cuda")
    dy = torch.full((64, 8), 2.0**-8, dtype=torch.bfloat16, device="cuda")
    accumulate(total, dy, torch.full((64, 8), 2.0**-8, dtype=torch.bfloat16, device="cuda"))
    assert torch.equal(total, torch.full_like(total, 1 + 2.0**-10))
