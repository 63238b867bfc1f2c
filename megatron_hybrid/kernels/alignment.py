"""Addresses of tensors [b, heads, s, width] that Hopper's Tensor Memory Accelerator reads and writes."""

from torch import Tensor

BYTES = 16
"""Of which addresses and strides must be multiples."""


def addressable(t: Tensor) -> Tensor:
    """The tensor itself, or a copy in the memory order [s, b, heads, width] if its address or strides do not fit."""
    strides = [n * t.element_size() for n, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
    if t.stride(-1) == 1 and t.data_ptr() % BYTES == 0 and all(n > 0 and n % BYTES == 0 for n in strides):
        return t
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
