"""Megatron's contiguous gradient buffers: their padding, and the shards of the distributed optimizer.

Reproduces ``core/optimizer/distrib_optimizer.py:498`` (``_compute_per_buffer_param_layout``) and
``core/optimizer/param_layout.py:19-43`` (alignment) of Megatron-Core 0.19 from the sizes of tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hybrid.accounting.tensors import Tensor

ALIGNMENT = 64
"""Elements: each parameter begins at a multiple (``pad_param_start``)."""
BUCKET_ALIGNMENT = 128
"""Elements: each bucket ends at a multiple of it and of the number of ranks (``bucket_end_divisor``)."""
BANDWIDTH_ALIGNMENT = 2**16
"""Elements: likewise, under ``--ddp-pad-buckets-for-high-nccl-busbw``."""


@dataclass(frozen=True)
class Buffer:
    """Parameters of one kind in one model chunk, and their gradients."""

    size: int
    """Elements, padding included."""
    owned: tuple[int, ...]
    """Parameters in each rank's shard, whose optimizer state it has."""


def plain_buffer(tensors: Sequence[Tensor]) -> Buffer:
    """Without the distributed optimizer: no padding, and all ranks own everything.

    Source: ``core/distributed/param_and_grad_buffer.py:947`` (``_compute_default_per_buffer_param_layout``).
    """
    size = sum(t.size for t in tensors)
    return Buffer(size, (size,))


def sharded_buffer(
    tensors: Sequence[Tensor], ranks: int, bucket_size: int | None = None, pads_for_bandwidth: bool = False
) -> Buffer:
    """With the distributed optimizer: padded buckets, of each of which a rank owns a contiguous share.

    Args:
        tensors: In the order of the model; buffers hold them the other way round.
        ranks: Data-parallel ranks that share the optimizer's state.
        bucket_size: Parameters from which a bucket is full; None: there is one.
        pads_for_bandwidth: Buckets end at multiples of 2**16.
    """
    divisor = math.lcm(ranks, BUCKET_ALIGNMENT, BANDWIDTH_ALIGNMENT if pads_for_bandwidth else 1)
    total, missing = 0, [0] * ranks
    for sizes in _buckets(tensors, bucket_size):
        gaps, end = _gaps(sizes)
        padded = _up(end, divisor)
        share = padded // ranks
        for start, stop in [*gaps, (end, padded)]:
            for rank in range(start // share, -(-stop // share)):  # those with a part of the gap
                missing[rank] += min(stop, (rank + 1) * share) - max(start, rank * share)
        total += padded
    return Buffer(total, tuple(total // ranks - gap for gap in missing))


def _buckets(tensors: Sequence[Tensor], bucket_size: int | None) -> list[list[int]]:
    """Sizes of the tensors of each bucket, in the order of the buffer."""
    buckets: list[list[int]] = []
    current: list[int] = []
    end = 0
    for tensor in reversed(tensors):
        if tensor.own_bucket and current:
            buckets.append(current)
            current, end = [], 0
        current.append(tensor.size)
        end = _up(end, ALIGNMENT) + tensor.size
        if tensor.own_bucket or bucket_size is not None and end >= bucket_size:
            buckets.append(current)
            current, end = [], 0
    return [*buckets, current] if current else buckets


def _gaps(sizes: list[int]) -> tuple[list[tuple[int, int]], int]:
    """What alignment leaves empty between tensors of a bucket (start and end); and the end of the last tensor."""
    gaps, end = [], 0
    for size in sizes:
        start = _up(end, ALIGNMENT)
        if start > end:
            gaps.append((end, start))
        end = start + size
    return gaps, end


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
