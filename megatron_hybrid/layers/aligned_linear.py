"""Column-parallel linear without matrix products of odd width.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, o rows of a projection. One rank's share
is marked: o/tp rows, s/cp tokens. t is the number of tokens of the hidden state on a rank: s/cp, or s/(cp tp) under
sequence parallelism.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.kernels.columns import split_columns


class PadRows(torch.autograd.Function):
    """A weight [n, h] with rows of zeros behind it; its gradient is a view, so that nothing is copied back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int, accumulated: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows = len(weight)
        if accumulated:
            ctx.save_for_backward(weight)
        padded = weight.new_empty(rows, weight.shape[1])
        padded[: ctx.rows] = weight
        padded[ctx.rows :] = 0
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is not None:
            return gradient[: ctx.rows], None, None
        if not ctx.saved_tensors:
            return None, None, None
        # The product has added the gradient to main_grad. As upstream's linears, give the hook of the parameter a
        # tensor that is not read, or is zero where the weight also has a gradient from elsewhere
        # (core/tensor_parallel/layers.py:692, core/distributed/distributed_data_parallel.py:490).
        (weight,) = ctx.saved_tensors
        weight.grad_added_to_main_grad = True
        unread = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return unread(weight), None, None


class AlignedColumnLinear(ColumnParallelLinear):
    """Upstream's column-parallel linear, whose products have a multiple of 8 rows whatever the weight has.

    cuBLAS's fast kernels for bf16 need rows of a multiple of 16 bytes; others took three times as long for 6,834
    channels as these for 6,840. Each forward pass appends rows of zeros to a copy of the weight, which autograd keeps
    until the backward pass. Their outputs are zero, and so are their parts of the input's gradient: the function is the
    same, and neither parameters nor checkpoints have the rows. Transformer Engine's is layers/aligned_te_linear.py.

    Args:
        keeps_padding: The output has columns of zeros behind its own. The caller drops them by
            :func:`megatron_hybrid.kernels.columns.split_columns`; else this linear does.

    The other arguments are upstream's.
    """

    pads_rows = True
    """It takes ``keeps_padding``."""

    def __init__(self, *args: Any, keeps_padding: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keeps_padding = keeps_padding

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """input [t, b, h], weight [o/tp, h] to [s/cp, b, o/tp]; called by upstream's ``forward``."""
        rows, padded = len(weight), padded_rows(len(weight))
        if padded == rows:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **kwargs)
        accumulated = kwargs["gradient_accumulation_fusion"] and hasattr(weight, "main_grad")
        product_weight = PadRows.apply(weight, padded, accumulated)  # [padded, h]
        if accumulated:
            # of fewer rows: the function behind it leaves the padding out (patches/missing_packages.py)
            product_weight.main_grad = weight.main_grad
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, padded - rows))
        y = super()._forward_impl(input=input, weight=product_weight, bias=bias, **kwargs)  # [s/cp, b, padded]
        return y if self.keeps_padding else split_columns(y, [rows])[0]
