"""Tensors that a forward pass keeps for the backward pass: the terms of a layer's table.

Each line is one storage: views of a tensor are kept with the tensor and stand there once; parameters and vectors of
their size stand nowhere. Measured (``tests/costs/test_activations_measured.py``) are the tables of ``device`` cpu with
``backend`` torch. Derived from reading are those of cuda: torch's fused RMSNorm, the kernels of attention
(``kernels/attention.py``), Megatron's fused activations (core/fusions/fused_bias_swiglu.py), mamba_ssm's
``MambaSplitConv1dScanCombinedFn`` (ops/triton/ssd_combined.py), Transformer Engine's ``LayerNormLinear``, which keeps
the norm's input and output as a norm and a linear do, and flash-linear-attention's ``ChunkGatedDeltaRuleFunction``.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.eight_bit import SCALES
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.accounting.sizes import Sizes

FP32 = 4
"""Bytes."""


class Saved(NamedTuple):
    """One storage that is kept."""

    name: str
    shape: tuple[Any, ...]
    each: float
    """Bytes of an element."""

    @property
    def bytes(self) -> float:
        return prod(self.shape) * self.each


@dataclass(frozen=True)
class Rank:
    """One rank's share of a layer and of a micro-batch."""

    whole: Sizes
    layout: Layout
    settings: ActivationSettings

    @property
    def s(self) -> Sizes:
        return self.layout.shard(self.whole)

    @property
    def tokens(self) -> int:
        """That the rank's layers see between their projections."""
        return self.layout.tokens(self.whole.seq_length)

    @property
    def rows(self) -> int:
        """Tokens of the rank's hidden state."""
        return self.tokens // self.layout.tp if self.layout.sequence_parallel else self.tokens

    @property
    def e(self) -> int:
        return self.settings.bytes_each

    @property
    def operand(self) -> float:
        """Of an element of a tensor that nothing but a linear keeps: of its 8-bit copy under ``--fp8-format``."""
        recipe = self.settings.eight_bit
        return self.e if recipe is None else 1 + SCALES[recipe]

    @property
    def cpu(self) -> bool:
        return self.settings.device == "cpu"

    @property
    def norm_bytes(self) -> int:
        """On CPU torch's RMSNorm works on an fp32 copy and keeps that; its fused kernel keeps the input itself."""
        return FP32 if self.cpu else self.e

    def keeps(self, module: str) -> bool:
        return module not in self.settings.recompute.modules


def norm(r: Rank, rows: float, width: float, weight: bool = True, groups: float = 1) -> list[Saved]:
    """RMSNorm of [rows, width] in groups; on CPU its weight multiplies a tensor that is kept too."""
    lines = [Saved("norm: input", (rows, width), r.norm_bytes), Saved("norm: 1 / rms", (rows, groups), FP32)]
    return lines + [Saved("norm: normalised", (rows, width), FP32)] * (weight and r.cpu)


def projected_columns(r: Rank, width: int, fewest_units: int | None = None) -> tuple[int, list[Saved]]:
    """Columns of a mixer's input projection, padding included, and its weight where each pass puts it together anew.

    That is where ranks share rows (layers/parts.py), and where rows of zeros are added (layers/aligned_linear.py,
    layers/aligned_te_linear.py).

    Args:
        width: Columns that the mixer reads.
        fewest_units: Heads or groups of the part that has fewest; None where ranks share none.
    """
    shares = fewest_units is not None and fewest_units < r.layout.tp
    columns = padded_rows(width, eight_bit=r.settings.eight_bit is not None and not shares)
    weight = Saved("weight with shared rows and rows of zeros", (columns, r.whole.hidden), r.e)
    return columns, [weight] * (shares or columns > width)


def ffn(r: Rank, rows: float, width: float, routed: bool = False) -> list[Saved]:
    """Between the two projections of an FFN (core/transformer/mlp.py:329): [rows, width] each."""
    lines = [Saved("first projection", (1 + r.s.gated, rows, width), r.e)]
    if not (r.settings.fused_activation and not r.cpu):
        if r.s.gated:
            lines.append(Saved("activated gate, gated half", (2, rows, width), r.e))
        if routed:
            lines.append(Saved("before the routing probability", (rows, width), r.e))
    return [*lines, Saved("input of the second projection", (rows, width), r.operand)]
