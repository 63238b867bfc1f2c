"""Transformer Engine's norm and column-parallel linear without matrix products of odd width.

To be imported only where Transformer Engine is. Shape letters as in ``aligned_linear.py``.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
from torch import Tensor

from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.kernels.columns import split_columns
from megatron_hybrid.layers.aligned_linear import PadRows


class AlignedNormColumnLinear(TELayerNormColumnParallelLinear):
    """Upstream's linear with its norm, for input projections of mixers, whose weight may have any number of rows.

    In 8 bits Transformer Engine takes multiples of 16 rows alone; in bf16 cuBLAS is three times as fast with multiples
    of 8. Each forward pass appends rows of zeros to a copy of the weight, as :class:`.AlignedColumnLinear` does:
    neither parameters nor checkpoints have them. Such a weight's gradient comes in the parameters' dtype and is added
    to ``main_grad`` by the hook of the parameter: Transformer Engine's product would write the padding there too.

    Args:
        keeps_padding: The output has columns of zeros behind its own. The caller drops them by
            :func:`megatron_hybrid.kernels.columns.split_columns`; else this linear does.

    The other arguments are upstream's.

    Raises:
        ValueError: A bias is asked for; no mixer has one here.
    """

    pads_rows = True

    def __init__(self, *args: Any, bias: bool, keeps_padding: bool = False, **kwargs: Any):
        if bias:
            raise ValueError("Input projections of mixers have no bias.")
        super().__init__(*args, bias=bias, **kwargs)
        self.keeps_padding = keeps_padding
        self.may_fuse = self.fuse_wgrad_accumulation = self.config.gradient_accumulation_fusion

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[t, b, h] to ([s/cp, b, o/tp], None)."""
        y, _ = super().forward(x)  # [s/cp, b, o/tp or a few zeros more]
        rows = len(self.weight)
        return (y if self.keeps_padding or y.shape[-1] == rows else split_columns(y, [rows])[0]), None

    def _get_weight_and_bias_tensors(self) -> tuple[Tensor, Any]:
        """The weight that ``LayerNormLinear.forward`` computes with, once it knows whether in 8 bits."""
        weight, bias = super()._get_weight_and_bias_tensors()
        rows, padded = len(weight), padded_rows(len(weight), eight_bit=self.fp8)
        self.fuse_wgrad_accumulation = self.may_fuse and padded == rows
        return (weight if padded == rows else PadRows.apply(weight, padded, False)), bias
