"""One row of the table: flags with the same status."""

from typing import NamedTuple


class Row(NamedTuple):
    """Flags with the same status."""

    kind: str
    """supported, translated, refused or no effect."""
    note: str
    """What they do, or why not: a clause that ends a sentence."""
    flags: str
    """Separated by spaces; one of several spellings is enough."""
    tried: bool = True
    """Whether a run of this project, on CPU or GPU, has used them."""
    by_rule: bool = False
    """Refused by a rule that knows the value, and says more than this note."""


def yes(note: str, flags: str) -> Row:
    return Row("supported", note, flags)


def untried(note: str, flags: str) -> Row:
    return Row("supported", note, flags, tried=False)


def ours(note: str, flags: str) -> Row:
    return Row("translated", note, flags)


def idle(note: str, flags: str) -> Row:
    return Row("no effect", note, flags)


def no(note: str, flags: str) -> Row:
    return Row("refused", note, flags)


def ruled_out(note: str, flags: str) -> Row:
    return Row("refused", note, flags, by_rule=True)
