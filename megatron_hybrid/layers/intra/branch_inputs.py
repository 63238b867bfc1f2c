"""Which columns of the fused input projection each branch of an intra-layer hybrid reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hybrid.kernels.columns import split_columns


class BranchInputs:
    """Splits the projection's output into the inputs of both branches and the gate.

    Args:
        widths: Name of each part, in the order of the projection, to its columns on this rank.
        branches: For each branch, the names of its parts in the order in which its core wants them.
    """

    def __init__(self, widths: Mapping[str, int], branches: Sequence[Sequence[str]]):
        chunks = read_together(list(widths), [list(names) for names in branches])
        self.chunk_widths = [sum(widths[name] for name in chunk) for chunk in chunks]
        # a value that is shared with the other branch may be elsewhere: each branch has its chunks in its own order
        first_parts = [chunk[0] for chunk in chunks]
        self.reads = [[first_parts.index(name) for name in names if name in first_parts] for names in branches]
        self.has_gate = "gate" in widths

    def split(self, projected: Any) -> tuple[list[list[Any]], Any | None]:
        """[s, b, sum of widths or more] to views, [s, b, w] each; what is behind them is padding.

        Returns:
            For each branch its views, to be put together in their order; and the gate's logits, None without a gate.
        """
        pieces = split_columns(projected, self.chunk_widths)
        return [[pieces[i] for i in reads] for reads in self.reads], pieces[-1] if self.has_gate else None


def read_together(parts: list[str], branches: list[list[str]]) -> list[tuple[str, ...]]:
    """Parts that the same branches read one after the other, in pieces: going back through few of them costs little."""
    chunks: list[tuple[str, ...]] = []
    for part in parts:
        last = chunks[-1][-1] if chunks else None
        readers = [names for names in branches if part in names or last in names]
        if last and all(last in names and part in names[names.index(last) + 1 :][:1] for names in readers):
            chunks[-1] += (part,)
        else:
            chunks.append((part,))
    return chunks
