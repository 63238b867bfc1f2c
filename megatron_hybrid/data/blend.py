"""Blends: how much of the training data comes from which data set, and for how many epochs.

A YAML file names the sources, with a share of the tokens or a number of epochs each; Megatron reads the result as
``--data-path WEIGHT PREFIX WEIGHT PREFIX ...``. docs/data.md shows a file.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

KEYS = ("name", "path", "weight", "epochs")
DEFAULT_SPLIT = "969, 30, 1"
"""What upstream takes where --data-path comes without --split (training/arguments.py, validate_args)."""


@dataclass(frozen=True)
class Source:
    """One data set of a blend."""

    name: str
    path: str
    """Prefix of its .bin and .idx."""
    weight: float | None = None
    """Share of the training tokens, as given; None if the shares follow from the epochs."""
    epochs: float | None = None
    """Maximum epochs, or without weights the number of epochs; None for no limit."""


@dataclass(frozen=True)
class Length:
    """How long a run is: ``steps`` of the flag that sets it, and the tokens of each."""

    flag: str
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step


class Draw(NamedTuple):
    """What a run draws from a source."""

    name: str
    share: float
    """Of the training tokens; those of all sources make 1."""
    available: int
    """Tokens in the train part of the source."""
    drawn: float | None
    """Tokens that the run takes, some of them several times; None where its length is not known."""
    allowed: float | None
    """Maximum epochs; None for no limit."""

    @property
    def epochs(self) -> float | None:
        """Epochs of the source."""
        return None if self.drawn is None else self.drawn / self.available


def read_blend(file: Path) -> list[Source]:
    """Read a blend file; paths in it are relative to its folder.

    Raises ValueError, with the source's name, if it is not a blend, or a source's files are not there.
    """
    import yaml

    from megatron_hybrid.data.fingerprint import first_twins

    if not file.is_file():
        raise ValueError(f"--data-blend {file}: there is no such file; give a YAML file with a list of sources.")
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--data-blend {file} is not YAML: {' '.join(str(error).split())}.") from None
    entries = found.get("sources") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"--data-blend {file} has no sources: it needs a list `sources:`, each entry with name, path, and weight "
            "or epochs."
        )
    unknown = [str(key) for key in found if key != "sources"]
    if unknown:
        raise ValueError(f"--data-blend {file}: unknown key {', '.join(unknown)} next to `sources`; drop it.")
    sources = [_source(file, number, entry) for number, entry in enumerate(entries, 1)]
    _check_together(file, sources)
    for source in sources:
        missing = [source.path + end for end in (".idx", ".bin") if not Path(source.path + end).is_file()]
        if missing:
            raise ValueError(
                f"--data-blend {file}, source {source.name}: there is no {missing[0]}. path is the prefix of a "
                ".bin/.idx pair, without the extension, relative to the folder of the blend file."
            )
    names = {source.path: source.name for source in sources}
    twins = first_twins(names)
    if twins:
        raise ValueError(
            f"--data-blend {file}: the sources {names[twins[0]]} ({twins[0]}) and {names[twins[1]]} ({twins[1]}) are "
            "the same data, so that a limit of epochs on one has no effect; make them one."
        )
    return sources


def _source(file: Path, number: int, entry: Any) -> Source:
    """One entry of the list, checked by itself."""
    if not isinstance(entry, dict):
        raise ValueError(f"--data-blend {file}: source {number} is {entry!r}; it needs the keys: {', '.join(KEYS)}.")
    where = f"--data-blend {file}, source {entry.get('name', number)}"
    unknown = [str(key) for key in entry if key not in KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; a source has {', '.join(KEYS)}.")
    for key in ("name", "path"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            told = "is missing" if value is None else f"is {value!r}, not a text"
            raise ValueError(f"{where}: {key} {told}; give each source a {key} (in quotes if it looks like a number).")
    return Source(
        entry["name"],
        str(file.parent / entry["path"]),
        _positive(where, "weight", entry.get("weight"), "the share of the training tokens"),
        _positive(where, "epochs", entry.get("epochs"), "the maximum number of epochs"),
    )


def _positive(where: str, key: str, value: Any, meaning: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML 1.1 reads 1e-3 as a text
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where}: {key} is {value!r}; it is {meaning}, a number above 0.")
    return number


def _check_together(file: Path, sources: list[Source]) -> None:
    for what, values in (("name", [s.name for s in sources]), ("path", [s.path for s in sources])):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"--data-blend {file}: two sources have the {what} {twice}; make them one, or rename one.")
    without = [s.name for s in sources if s.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"--data-blend {file}: some sources have a weight, but not {', '.join(without)}. Give all of them a "
            "weight, or none and epochs to all."
        )
    bare = [s.name for s in sources if s.weight is None and s.epochs is None]
    if bare:
        raise ValueError(f"--data-blend {file}, source {bare[0]}: neither weight nor epochs is given; give one.")


def split_fractions(split: str, trains: bool = True) -> list[float]:
    """Return where the train, validation and test parts of --split end, as fractions of a data set's sequences.

    As upstream works them out, to the last bit (core/datasets/blended_megatron_dataset_config.py,
    parse_and_normalize_split and convert_split_vector_to_split_matrix). Raises ValueError without a train part, unless
    nothing is trained.
    """
    try:
        parts = [float(text) for text in re.findall(r"[.0-9]+", split)]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or sum(parts) <= 0 or (trains and parts[0] <= 0):
        raise ValueError(
            f"--split {split!r} leaves nothing to train on; give parts for train, validation and test: 98,1,1."
        )
    parts += [0.0] * (3 - len(parts))
    total = reduce(add, parts)  # sum() would round better than upstream does
    return list(accumulate(part / total for part in parts))


def check_parts(path: str, split: str, trains: bool = True) -> None:
    """Refuse a data set that is too small for its validation or test part, where upstream would loop forever.

    Raises:
        ValueError: With the number of sequences, or an index that cannot be read.
    """
    from megatron_hybrid.data.indexed import read_index

    lengths = read_index(Path(path)).lengths
    count, begin = len(lengths), 0.0
    for name, end in zip(("training", "validation", "test"), split_fractions(split, trains), strict=True):
        part = lengths[round(begin * float(count)) : round(end * float(count))]
        if end > begin and not part.any():
            raise ValueError(
                f"{path} has {count:,} sequences, of which --split {split} leaves {
                    'none' if not len(part) else 'empty ones alone'
                } for {name}. Give that part more, or nothing (--split 90,10,0, or 1,0,0 with --eval-iters "
                "0); or join this data set with another (tools/merge_datasets.py)."
            )
        begin = end


def train_tokens(path: str, split: str) -> int:
    """Return the tokens in the train part of a data set.

    Upstream cuts between sequences, by their number (core/datasets/blended_megatron_dataset_builder.py,
    _build_megatron_dataset_splits). Raises ValueError if the index cannot be read, or the part is empty.
    """
    import numpy as np

    from megatron_hybrid.data.indexed import read_index

    lengths = read_index(Path(path)).lengths
    tokens = int(lengths[: round(split_fractions(split)[0] * float(len(lengths)))].sum(dtype=np.int64))
    if tokens == 0:
        raise ValueError(
            f"{path} has {len(lengths):,} sequences, of which --split {split} leaves no token to train on; give the "
            "train part more, or drop this data set."
        )
    return tokens


def weights(sources: Sequence[Source], available: Sequence[int]) -> list[float]:
    """Return the share of each source, in sum 1; available: tokens of each, needed where there are no weights."""
    raw = [s.weight or (s.epochs or 1.0) * tokens for s, tokens in zip(sources, available, strict=True)]
    return [weight / math.fsum(raw) for weight in raw]


def data_path(file: Path, split: str) -> list[str]:
    """Return the values of --data-path that a blend file stands for."""
    sources = read_blend(file)
    if len(sources) == 1:
        return [sources[0].path]
    needed = [1 if s.weight else train_tokens(s.path, split) for s in sources]
    return [word for s, share in zip(sources, weights(sources, needed), strict=True) for word in (repr(share), s.path)]


def draws(sources: Sequence[Source], split: str, length: Length | None) -> list[Draw]:
    """Return what a run of this length draws from each source; reads the sources' indices."""
    available = [train_tokens(source.path, split) for source in sources]
    shares = weights(sources, available)
    return [
        Draw(source.name, share, tokens, share * length.tokens if length else None, source.epochs)
        for source, share, tokens in zip(sources, shares, available, strict=True)
    ]


def check_epochs(file: str, drawn: Sequence[Draw], length: Length | None) -> None:
    """Refuse a run with more epochs of a source than its blend file allows.

    Raises:
        ValueError: With the sources and their numbers, and the longest run that there may be.
    """
    limited = [draw for draw in drawn if draw.allowed is not None]
    if limited and length is None:
        raise ValueError(
            f"--data-blend {file} limits the epochs of {limited[0].name}, but the flags do not say how many tokens the "
            "run has: give --train-samples instead of --train-iters."
        )
    over = {d.name: d.epochs / d.allowed for d in limited if d.epochs and d.allowed}
    if length is None or max(over.values(), default=0.0) <= 1 + 1e-9:  # a factor of 1, but for rounding
        return
    told = "; ".join(
        f"{d.name}: {d.drawn:,.0f} of them ({100 * d.share:.4g}%) out of {d.available:,} are {d.epochs:.4g} epochs, "
        f"and {d.allowed:g} are allowed"
        for d in limited
        if over[d.name] > 1 + 1e-9
    )
    most = math.floor(length.steps / max(over.values()) * (1 + 1e-9))
    shorter = f"{length.flag} {most} or fewer, " if most else ""
    raise ValueError(
        f"--data-blend {file}: a run of {length.tokens:,} tokens ({length.flag} {length.steps}) repeats too much. "
        f"{told}. Give {shorter}a smaller weight, more data, or larger epochs."
    )


def table(drawn: Sequence[Draw]) -> list[str]:
    """Return the lines of a table with a heading, a line for each source, and the sum of several."""
    rows = [("source", "weight", "available", "drawn", "epochs", "allowed")]
    for d in drawn:
        taken = ("-", "-") if d.drawn is None else (f"{d.drawn:,.0f}", f"{d.epochs:.2f}")
        rows.append((d.name, f"{d.share:.4f}", f"{d.available:,}", *taken, f"{d.allowed:g}" if d.allowed else "any"))
    if len(drawn) > 1:
        known = [d.drawn for d in drawn if d.drawn is not None]
        total = f"{math.fsum(known):,.0f}" if known else "-"
        rows.append(("all", f"{1:.4f}", f"{sum(d.available for d in drawn):,}", total, "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        (name, *figures), (first, *others) = row, widths
        columns = [name.ljust(first), *(text.rjust(w) for text, w in zip(figures, others, strict=True))]
        lines.append("  ".join(columns).rstrip())
    return lines


def sources_of(words: Sequence[str]) -> list[Source]:
    """Return the sources of a --data-path with weights, or of one prefix; none of several without weights.

    Upstream reads those by their length, each once, and a name here is the prefix's last part.
    """
    if len(words) == 1:
        return [Source(Path(words[0]).name, words[0])]
    try:
        given = [float(word) for word in words[::2]]
    except ValueError:
        return []
    paths = words[1::2]
    if len(paths) < len(given) or min(given) < 0 or sum(given) <= 0:
        return []
    return [Source(Path(path).name, path, weight) for weight, path in zip(given, paths, strict=True) if weight]
