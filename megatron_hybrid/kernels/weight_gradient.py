"""Gradient accumulation inside the matrix product that makes a weight's gradient.

Shape letters: t tokens, n and h output and input channels of a linear.
"""

import torch
from torch import Tensor

ALIGNMENT = 8
"""Rows of a product that cuBLAS's fast kernels want in multiples, which are 16 bytes of bf16."""


def accumulate(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total += dy^T x, without a tensor for the product.

    On CUDA the products of bf16 or fp16 go into an fp32 total unrounded (cuBLAS with beta 1: aten/native/cuda/Blas.cpp,
    ``addmm.dtype_out``). The CPU has no such product: it is made of copies in the total's dtype.

    Args:
        total: [n, h], contiguous, in fp32 or in the dtype of dy and x.
        dy: [t, n], or [t, more than n], whose last columns are padding.
        x: [t, h].
    """
    n, padded = len(total), dy.shape[1]
    if padded == n or not dy.is_cuda:
        _accumulate(total, dy[:, :n], x)
        return
    # A padded dy has aligned rows, but the total has not as many of them. The few that are left are a small product.
    aligned = n - n % ALIGNMENT
    for start, stop in ((0, aligned), (aligned, n)):
        if stop > start:
            _accumulate(total[start:stop], dy[:, start:stop], x)


def _accumulate(total: Tensor, dy: Tensor, x: Tensor) -> None:
    if total.dtype == dy.dtype:
        total.addmm_(dy.t(), x)
    elif total.is_cuda:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(dy.t().to(total.dtype), x.to(total.dtype))
