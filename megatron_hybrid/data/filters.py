"""Small filters of documents, off by default. For more there are tools made for it, such as datatrove."""

import re
from dataclasses import dataclass

_NOT_ALPHANUMERIC_ASCII = bytes(code for code in range(128) if not chr(code).isalnum())


@dataclass(frozen=True)
class Filters:
    """What a document has to be; None leaves a rule out."""

    min_chars: int | None = None
    """Characters (Unicode code points) at least."""
    max_chars: int | None = None
    """Characters at most."""
    min_alphanumeric: float | None = None
    """Share of characters that are letters or digits (str.isalnum), at least; from 0 to 1."""

    def __post_init__(self) -> None:
        """Raises ValueError for a rule that no document can follow, or any."""
        if self.min_alphanumeric is not None and not 0 < self.min_alphanumeric <= 1:
            raise ValueError(f"--min-alphanumeric {self.min_alphanumeric}: it is a share, above 0 and at most 1.")
        for name, value in (("min", self.min_chars), ("max", self.max_chars)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}-chars {value}: a document has at least one character.")
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"--min-chars {self.min_chars} is above --max-chars {self.max_chars}: nothing would pass.")

    def __bool__(self) -> bool:
        return self != Filters()

    def broken(self, text: str) -> str:
        """Return the first rule that ``text`` breaks; empty if it passes."""
        if self.min_chars is not None and len(text) < self.min_chars:
            return "min_chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "max_chars"
        if self.min_alphanumeric is not None and alphanumeric(text) < self.min_alphanumeric * len(text):
            return "min_alphanumeric"
        return ""


def alphanumeric(text: str) -> int:
    """Count the letters and digits of a text."""
    if text.isascii():
        return len(text.encode().translate(None, _NOT_ALPHANUMERIC_ASCII))
    return sum(map(str.isalnum, re.sub(r"\s+", "", text)))
