"""Where heads of attention stand in a projection, and how far RoPE turns them.

Shape letters: s tokens, d head size of Q and K, dv head size of V, r channels of a head that RoPE turns.
"""

from typing import NamedTuple

from torch import Tensor


class HeadColumns(NamedTuple):
    """Where the heads stand in a projection: in groups, each of query heads, then key heads, then value heads."""

    groups: int
    queries: int
    """Query heads of a group."""
    keys: int
    """Key heads of a group."""
    values: int
    """Value heads of a group."""
    width: int
    """Head size of Q and K, d."""
    value_width: int
    """Head size of V, dv."""

    @property
    def group_columns(self) -> int:
        return (self.queries + self.keys) * self.width + self.values * self.value_width

    @property
    def columns(self) -> int:
        return self.groups * self.group_columns


class Turns(NamedTuple):
    """How far RoPE turns each pair of channels at each position."""

    table: Tensor
    """[s, 2, r/2] fp32: cosines and sines, each times the factor that the rotated channels get."""
    interleaved: bool
    """Pairs are neighbours (2i, 2i + 1) rather than (i, i + r/2)."""
