"""The gradient of a weight, added inside its product."""

import pytest
import torch

from megatron_hybrid.kernels.weight_gradient import accumulate


@pytest.mark.parametrize(("total_dtype", "dtype"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16",) * 2])
@pytest.mark.parametrize("padding", [0, 5])
def test_adds_the_product_to_what_is_there(total_dtype, dtype, padding):
    torch.manual_seed(0)
    total_dtype, dtype = getattr(torch, total_dtype), getattr(torch, dtype)
    dy, x = torch.randn(40, 11 + padding).to(dtype), torch.randn(40, 6).to(dtype)
    total = torch.randn(11, 6).to(total_dtype)
    wanted = total.double() + dy[:, :11].t().double() @ x.double()
    where = total.data_ptr()
    accumulate(total, dy, x)
    assert total.data_ptr() == where
    # sums of 40 products in fp32; a bf16 total is rounded once more, to 2^-9
    tolerance = 1e-5 if total_dtype == torch.float32 else 4e-3
    assert (total.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
