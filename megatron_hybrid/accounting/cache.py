"""What a layer keeps of a context when it generates."""

from typing import NamedTuple


class Cache(NamedTuple):
    """Elements that are kept of one sequence."""

    key_value: int = 0
    """Keys and values: they grow with the context, up to the window where there is one."""
    conv: int = 0
    """The last inputs of the convolutions."""
    state: int = 0
    """Recurrent states."""

    def size(self, element_bytes: int = 2, state_bytes: int = 2) -> int:
        """Bytes; ``state_bytes`` for each element of a recurrent state, which often stays in fp32 (4)."""
        return (self.key_value + self.conv) * element_bytes + self.state * state_bytes

    def plus(self, other: "Cache") -> "Cache":
        """The sum, part by part."""
        return Cache(*(a + b for a, b in zip(self, other, strict=True)))
