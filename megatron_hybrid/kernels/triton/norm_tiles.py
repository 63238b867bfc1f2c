"""Steps that the kernels of norms have in common: rows of one group of channels, and what a norm makes of them.

A tile is [R rows, W channels of one group], in fp32; channels and rows that do not exist are zero.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192
"""Channels of a group that a program has in registers."""


def shape_class(width: int) -> str:
    """Of the table of launches: the widest groups that a line is for."""
    return str(min(size for size in (256, 2048, 4096, WIDEST) if width <= size))


def aligned_strides(width: int, *tensors: Tensor) -> tuple[int, list[int], int]:
    """How a kernel walks along the rows of tensors [s, b, c], the last stride of which is 1.

    Args:
        width: Channels of a group, where tiles begin.

    Returns:
        Samples between two tokens: one, where rows of all tensors stand evenly. Then the token and the sample stride of
        each tensor, in the largest unit of elements, up to 16, that they are multiples of; Triton knows from it how
        wide loads may be. And that unit.
    """
    samples = tensors[0].shape[1]
    even = all(t.stride(0) == samples * t.stride(1) for t in tensors)
    strides = [stride for t in tensors for stride in ((t.stride(1), 0) if even else t.stride()[:2])]
    unit = math.gcd(16, width, *strides)
    return 1 if even else samples, [stride // unit for stride in strides], unit


@triton.jit
def tile_rows(base, rows, samples, token_stride, sample_stride, w, ALIGNED: tl.constexpr):
    """Addresses [R, W] of rows ``token * samples + sample`` of [s, b, ...]; strides in units of ALIGNED elements."""
    at = (rows // samples).to(tl.int64) * token_stride + (rows % samples).to(tl.int64) * sample_stride
    return base + at[:, None] * ALIGNED + w[None, :]


@triton.jit
def normalise(x, eps, WIDTH: tl.constexpr):
    """x / rms(x) of each row, and 1 / rms, [R]."""
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps)
    return x * inverse[:, None], inverse


@triton.jit
def normalise_gradient(dy, y, inverse, WIDTH: tl.constexpr):
    """The gradient of x, where y = x / rms(x) has gradient dy."""
    along = tl.sum(dy * y, 1) / WIDTH
    return (dy - y * along[:, None]) * inverse[:, None]
