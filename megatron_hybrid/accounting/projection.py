"""Named rows of a projection, and how tensor-parallel ranks share them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Some rows of the input projection with one meaning.

    A part is ``units`` blocks (heads or groups) of ``width`` rows. Tensor-parallel ranks take whole units; where there
    are fewer units than ranks, a unit is shared by several.
    """

    name: str
    units: int
    width: int

    @property
    def rows(self) -> int:
        return self.units * self.width

    def local_rows(self, tp: int) -> int:
        """Rows that a rank computes."""
        return max(1, self.units // tp) * self.width

    def is_shared(self, tp: int) -> bool:
        """Whether several ranks compute the same rows."""
        return self.units < tp

    def start(self, tp: int, rank: int) -> int:
        """First row of a rank's units."""
        return rank * self.units // tp * self.width


ALIGNMENT = 8
"""Elements of bf16 in 16 bytes, of which cuBLAS's fast kernels want whole multiples in a row."""
EIGHT_BIT_ALIGNMENT = 16
"""The same of 8 bits, of which Transformer Engine takes nothing else (``assert_dim_for_fp8_exec``)."""


def padded_rows(rows: int, eight_bit: bool = False) -> int:
    """Rows of an input projection's product on one rank, zeros included (layers/aligned_linear.py)."""
    return rows + -rows % (EIGHT_BIT_ALIGNMENT if eight_bit else ALIGNMENT)
