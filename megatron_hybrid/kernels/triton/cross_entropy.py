"""Cross entropy of rows of logits on CUDA: :mod:`megatron_hybrid.kernels.cross_entropy_rows` in Triton.

One program has one row. It reads the row once for the statistics and once more, from the end to the start, for the
gradient, which it writes in place: what was read last is likeliest to be in the caches still.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hybrid.kernels.cross_entropy_rows import Statistics
from megatron_hybrid.kernels.triton.configs import launch_options

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first"])
def _rows_kernel(
    logits,
    labels,
    weights,
    log_totals,
    maxima,
    totals,
    label_logits,
    columns,
    width,
    first,
    row_stride,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    here = logits + row.to(tl.int64) * row_stride
    lanes = tl.arange(0, BLOCK)
    label = tl.load(labels + row) - first
    label = tl.where((label >= 0) & (label < width), label, -1).to(tl.int32)  # column of this rank's slice, or -1
    blocks = tl.cdiv(width, BLOCK)
    if STATISTICS:
        # before the loop: its reductions keep warps together, and the gradient's first stores behind this load
        label_logit = tl.load(here + label, mask=label >= 0, other=-float("inf")).to(tl.float32)
        maximum = tl.full((), -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        column = tl.full((), 0, tl.int32)
        for i in tl.range(blocks, num_stages=STAGES):
            at = i * BLOCK + lanes
            x = tl.load(here + at, mask=at < width, other=-float("inf")).to(tl.float32)
            top = tl.max(x, 0)
            if BEST:
                where = tl.min(tl.where(x == top, at, width), 0)
                column = tl.where(top > maximum, where, column)
            larger = tl.maximum(maximum, top)
            total = total * tl.exp2((maximum - larger) * LOG2_E) + tl.exp2((x - larger) * LOG2_E)
            maximum = larger
        total_of_row = tl.sum(total, 0)
        tl.store(maxima + row, maximum)
        tl.store(totals + row, total_of_row)
        tl.store(label_logits + row, label_logit)
        if BEST:
            tl.store(columns + row, column.to(tl.int64))
        log_total = maximum + tl.log(total_of_row)
    else:
        log_total = tl.load(log_totals + row)
    if GRADIENT:
        weight = tl.load(weights + row)
        for i in tl.range(blocks, num_stages=STAGES):
            at = (blocks - 1 - i) * BLOCK + lanes
            x = tl.load(here + at, mask=at < width, other=-float("inf")).to(tl.float32)
            p = tl.exp2((x - log_total) * LOG2_E)
            p = tl.where(at == label, p - 1, p)
            tl.store(here + at, (p * weight).to(logits.dtype.element_ty), mask=at < width)


def statistics(
    logits: Tensor, labels: Tensor, first: int = 0, weights: Tensor | None = None, best: bool = False
) -> Statistics:
    """As :func:`megatron_hybrid.kernels.cross_entropy_rows.statistics`, for rows that are contiguous.

    Raises:
        ValueError: Logits that are not bf16, fp16 or fp32, or whose rows are not contiguous.
    """
    maxima, totals, label_logits = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    columns = labels.new_empty(labels.shape) if best else None
    _launch(logits, labels, first, weights, None, (maxima, totals, label_logits, columns))
    return Statistics(maxima, totals, label_logits, columns)


def gradient_(logits: Tensor, labels: Tensor, first: int, log_total: Tensor, weights: Tensor) -> None:
    """As :func:`megatron_hybrid.kernels.cross_entropy_rows.gradient_`, for rows that are contiguous.

    Raises:
        ValueError: As :func:`statistics`.
    """
    _launch(logits, labels, first, weights, log_total, None)


def _launch(
    logits: Tensor,
    labels: Tensor,
    first: int,
    weights: Tensor | None,
    log_total: Tensor | None,
    results: tuple[Tensor | None, ...] | None,
) -> None:
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32) or logits.stride(1) != 1:
        raise ValueError(
            f"the logits are {logits.dtype} with strides {logits.stride()}: this kernel takes bf16, fp16 or fp32 and "
            "contiguous rows"
        )
    width = logits.shape[1]
    shape_class = next((str(most) for most in (4096, 32768) if width <= most), "any")
    results = results or (None,) * 4
    labels = labels.contiguous()
    weights = None if weights is None else weights.contiguous()
    log_total = None if log_total is None else log_total.contiguous()
    _rows_kernel[(logits.shape[0],)](
        logits,
        labels,
        weights,
        log_total,
        *results,
        width,
        first,
        logits.stride(0),
        STATISTICS=results[0] is not None,
        GRADIENT=weights is not None,
        BEST=results[3] is not None,
        **launch_options("cross_entropy", shape_class),
    )
