"""The mended interpreter (tests/support/triton_interpreter.py) against numpy and torch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.support.triton_interpreter import interpreted, to_bits, to_float

pytestmark = pytest.mark.triton_interpreter


@triton.jit
def scaled(x, factor):
    return x * factor


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, count, SIZE: tl.constexpr):
    """Sum, product, maximum, comparison and a function's result, each in its row."""
    at = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    total = a
    for _ in range(count):
        total = total + b
    tl.store(out_ptr + at, total)
    tl.store(out_ptr + SIZE + at, a * b)
    tl.store(out_ptr + 2 * SIZE + at, tl.where(a > b, a, b))
    tl.store(out_ptr + 3 * SIZE + at, scaled(a.to(tl.float32), 1.01))


@triton.jit
def product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def reductions(a_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + at)
    rows = tl.arange(0, SIZE)
    tl.store(out_ptr + rows, tl.max(a, 1))
    tl.store(out_ptr + SIZE + rows, tl.sum(a.to(tl.float32), 0))
    tl.store(out_ptr + 2 * SIZE + rows, tl.sum(tl.cumsum(a.to(tl.float32), 1, reverse=True), 1))


def test_this_process_interprets():
    assert interpreted()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic(dtype):
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros(4, 64, dtype=dtype)
    arithmetic[(1,)](a, b, out, 3, SIZE=64)
    wanted = [a + b + b + b, a * b, torch.maximum(a, b), (a.float() * 1.01).to(dtype)]
    for got, want in zip(out, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(dtype):
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros(32, 32)
    product[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype):
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros(3, 16)
    reductions[(1,)](a, out, SIZE=16)
    assert torch.equal(out[0], a.max(1).values.float())
    torch.testing.assert_close(out[1], a.float().sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out[2], (a.float() * torch.arange(1, 17)).sum(1), rtol=1e-5, atol=1e-5)


def test_bf16_is_rounded_to_nearest_even():
    values = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-39, 38, 10000)
    edges = torch.tensor([1.998, 1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-40])
    values = torch.cat([values, edges])
    got = to_bits(values.numpy())
    assert np.array_equal(got, values.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(to_float(got), values.bfloat16().float().numpy())
    assert np.isnan(to_float(to_bits(np.array([np.nan], np.float32))))
