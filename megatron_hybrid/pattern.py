"""The layer pattern: one character per layer, checked and expanded before Megatron sees it.

The language is upstream's (``megatron/core/models/hybrid/hybrid_layer_allocation.py``) with more
layers (:mod:`megatron_hybrid.layers.registry`) and repetition::

    pattern = stages [ "/" heads ]...     "/" starts a multi-token-prediction (MTP) head
    stages  = layers [ "|" layers ]...    "|" starts the next pipeline stage
    layers  = (symbol | "(" ... ")" [count])...

``(M-)3P-`` is ``M-M-M-P-``; groups nest and may hold ``|``; white space means nothing.

A *block* is the paper's unit: a mixer and its feed-forward layer, two characters;
:mod:`megatron_hybrid.placement` makes patterns of them.

This module imports neither torch nor Megatron.
"""

from dataclasses import dataclass

from megatron_hybrid.layers.registry import LAYERS, RESERVED

MAX_LAYERS = 10_000
"""Longest expansion; more is a slip such as ``(M-)100000``."""


_DIGITS = "0123456789"


class PatternError(ValueError):
    """A pattern that cannot be read. ``position`` is 1-based and counts characters as typed."""

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason, self.text, self.position = reason, text, position
        one_line = "".join(" " if c.isspace() else c for c in text)
        super().__init__(f"{reason}\n    {one_line}\n    {' ' * (position - 1)}^")


@dataclass(frozen=True)
class Pattern:
    """A checked, expanded pattern. Made by :func:`parse` and :func:`from_blocks`."""

    segments: tuple[str, ...]
    """Layers of each pipeline segment, in order; one segment when there is no ``|``."""
    mtp: str = ""
    """Layers of one MTP head."""
    mtp_depths: int = 0
    """Number of MTP heads."""

    def __str__(self) -> str:
        """The explicit string that Megatron reads."""
        return "|".join(self.segments) + ("/" + self.mtp) * self.mtp_depths

    @property
    def layers(self) -> str:
        """The main layers without ``|``."""
        return "".join(self.segments)

    @property
    def mixer_depths(self) -> tuple[int, ...]:
        """For each main layer, the mixers in front of it: the index of its block."""
        layers = self.layers
        return tuple(sum(LAYERS[c].kind == "mixer" for c in layers[:i]) for i in range(len(layers)))

    def counts(self) -> dict[str, int]:
        """Layers of each symbol of :data:`LAYERS`, every MTP head included (as upstream counts)."""
        everything = self.layers + self.mtp * self.mtp_depths
        return {symbol: everything.count(symbol) for symbol in LAYERS}

    def without_boundaries(self) -> "Pattern":
        """The same model with no ``|``: what two layouts of one model have in common."""
        return Pattern((self.layers,), self.mtp, self.mtp_depths)

    def warnings(self) -> list[str]:
        """Sentences about choices that are legal and probably not meant."""
        found = []
        mixers = [LAYERS[c] for c in self.layers if LAYERS[c].kind == "mixer"]
        if not mixers:
            found.append(
                f"the pattern {self} has no mixer: no token sees another one. Add one of {symbols_of('mixer')}."
            )
        elif mixers[0].attention_bearing and not all(m.attention_bearing for m in mixers):
            found.append(
                f"the first mixer of {self} is {mixers[0].symbol} ({mixers[0].name}); the paper "
                "found that attention in the first block costs quality (2.771 nats/token against "
                "2.741 in the middle, one attention block of 13). Start with M, or use "
                "--block-placement scatter or middle."
            )
        return found


def parse(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        PatternError: with the character, its position and the rule that it breaks.
    """
    cells = _expand(text)
    heads: list[list[tuple[str, int]]] = [[]]
    slashes: list[int] = []
    for char, position in cells:
        if char == "/":
            heads.append([])
            slashes.append(position)
        else:
            heads[-1].append((char, position))

    main = "".join(char for char, _ in heads[0])
    if not main.replace("|", ""):
        at = slashes[0] if slashes else max(1, len(text))
        raise PatternError("a pattern needs at least one layer, such as M-*-", text, at)
    mtp = "".join(char for char, _ in heads[1]) if slashes else ""
    for head, slash in zip(heads[1:], slashes, strict=True):
        _check_head(head, mtp, slash, text)
    return Pattern(tuple(main.split("|")), mtp, len(slashes))


def _check_head(head: list[tuple[str, int]], first: str, slash: int, text: str) -> None:
    for char, position in head:
        if char == "|":
            reason = (
                f"| at position {position} is inside an MTP head; heads live on the last pipeline "
                "stage, so | may only stand before the first /"
            )
            raise PatternError(reason, text, position)
    layers = "".join(char for char, _ in head)
    if not layers:
        reason = f"/ at position {slash} starts an MTP head without layers; add some, as in M-*-/*-"
        raise PatternError(reason, text, slash)
    if layers != first:
        reason = (
            f"the MTP head after position {slash} is {layers}, the first one is {first}; "
            "all MTP heads must be identical"
        )
        raise PatternError(reason, text, slash)


def _expand(text: str) -> list[tuple[str, int]]:
    """Resolve groups: the characters left, each with its 1-based position in ``text``."""
    open_groups: list[tuple[int, list[tuple[str, int]]]] = []
    cells: list[tuple[str, int]] = []
    index = 0
    while index < len(text):
        char, position = text[index], index + 1
        index += 1
        if char.isspace():
            continue
        if char == "(":
            open_groups.append((position, cells))
            cells = []
        elif char == ")":
            if not open_groups:
                raise PatternError(f") at position {position} has no (", text, position)
            start, outer = open_groups.pop()
            if not cells:
                reason = f"the group ( ) at position {start} holds no layer; fill or remove it"
                raise PatternError(reason, text, start)
            count, index = _count(text, index)
            if len(outer) + len(cells) * count > MAX_LAYERS:
                reason = (
                    f"repeating the group at position {start} gives more than {MAX_LAYERS} characters; lower the count"
                )
                raise PatternError(reason, text, start)
            cells = outer + cells * count
        elif char in _DIGITS:
            reason = (
                f"the count at position {position} follows no group; a count repeats what stands in ( ), as in (M-)3"
            )
            raise PatternError(reason, text, position)
        else:
            _check_symbol(char, text, position)
            cells.append((char, position))
    if open_groups:
        start = open_groups[-1][0]
        raise PatternError(f"( at position {start} is never closed; add a )", text, start)
    return cells


def _count(text: str, index: int) -> tuple[int, int]:
    """The count at or after ``index`` (1 when there is none) and the index behind it."""
    start = index
    while start < len(text) and text[start].isspace():
        start += 1
    end = start
    while end < len(text) and text[end] in _DIGITS:
        end += 1
    if end == start:
        return 1, index
    # More digits than MAX_LAYERS has are too many; int() of thousands of them would be refused.
    digits = text[start:end].lstrip("0")
    if not digits:
        reason = f"the count at position {start + 1} is 0; remove the group or repeat it at least once"
        raise PatternError(reason, text, start + 1)
    return int(digits[: len(str(MAX_LAYERS)) + 1]), end


def _check_symbol(char: str, text: str, position: int) -> None:
    if char in LAYERS or char in "|/":
        return
    if char in RESERVED:
        reason = f"{RESERVED[char]} (position {position}); use one of {symbols_of()}"
    else:
        reason = f"{char!r} at position {position} is not a layer; use one of {symbols_of()}"
        if char.upper() in LAYERS:
            reason += f" (did you mean {char.upper()}?)"
    raise PatternError(reason, text, position)


def symbols_of(kind: str | None = None) -> str:
    """The symbols of a kind of layer, for messages."""
    return " ".join(s for s, layer in LAYERS.items() if kind in (None, layer.kind))


def check_pipeline(pattern: Pattern, pp: int, vpp: int | None = None) -> int:
    """Check that a pattern fits ``pp`` pipeline stages of ``vpp`` segments each.

    Returns:
        Segments per stage (1 without virtual pipelining).

    Raises:
        ValueError: with the numbers and the remedy.
    """
    for name, value in (("pipeline stages", pp), ("virtual stages per rank", vpp)):
        if value is not None and value < 1:
            raise ValueError(f"the number of {name} is {value}; it must be at least 1")
    segments, layers = len(pattern.segments), len(pattern.layers)
    if segments == 1:
        if vpp not in (None, 1):
            raise ValueError(
                f"{vpp} virtual stages per rank need {pp * vpp} segments, and the pattern "
                f"{pattern} has no |; put {pp * vpp - 1} of them where the segments start"
            )
        if layers < pp:
            raise ValueError(f"{layers} layers are too few for {pp} pipeline stages; give at most {layers} stages")
        if layers % pp:
            raise ValueError(
                f"{layers} layers do not divide over {pp} pipeline stages; put {pp - 1} | into the "
                f"pattern {pattern} where the stages start (they need not be equal), or choose a "
                f"number of stages that divides {layers}"
            )
        return 1
    if pp == 1:
        raise ValueError(
            f"the pattern {pattern} has {segments} pipeline segments, and there is one pipeline "
            f"stage; remove the |, or set --pipeline-model-parallel-size to a divisor of {segments}"
        )
    if segments % pp:
        raise ValueError(
            f"the pattern {pattern} has {segments} pipeline segments, which do not divide over "
            f"{pp} pipeline stages; write {pp - 1} | (or {2 * pp - 1} for two segments per stage), "
            f"or set --pipeline-model-parallel-size to a divisor of {segments}"
        )
    if vpp is not None and segments != pp * vpp:
        raise ValueError(
            f"{pp} pipeline stages of {vpp} segments need {pp * vpp} segments, and the pattern "
            f"{pattern} has {segments}; write {pp * vpp - 1} |"
        )
    return segments // pp
