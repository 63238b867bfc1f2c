"""The inputs of a merge: which they are, whether they are complete, and whether they are compatible."""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megatron_hybrid.data import manifest
from megatron_hybrid.data.indexed import bin_path, idx_path, read_index, token_blocks
from megatron_hybrid.data.verify import index_fault
from megatron_hybrid.files import checksum_text

_SHARD = re.compile(r"(.+)\.shard-(\d{5,})-of-(\d{5,})")


class Shard(NamedTuple):
    """Which part of a run of preprocessing a data set is."""

    base: str
    """The data set's name without the shard."""
    number: int
    """From 0."""
    of: int


@dataclass(frozen=True)
class Input:
    """One of the data sets that are merged; its index is mapped only while it is read."""

    prefix: Path
    manifest: dict[str, Any] | None
    shard: Shard | None
    dtype: np.dtype
    documents: int
    tokens: int
    one_each: bool
    """Whether every document is one sequence."""

    @property
    def bytes(self) -> int:
        """Size of PREFIX.bin."""
        return self.tokens * self.dtype.itemsize


# --- the inputs ------------------------------------------------------------------------------------


def find_prefixes(names: tuple[str, ...] | list[str]) -> list[Path]:
    """Return the prefixes that names and globs stand for, also by the files of a data set.

    The order is that of ``names``, globs sorted. X.bin, X.idx and X.json together are X once: a shell makes them of
    ``X*``. Raises ValueError if a name matches nothing, or a data set is named twice.
    """
    prefixes: list[Path] = []
    seen: dict[Path, list[str]] = {}
    for name in names:
        stem, ending = _split(name)
        found = [Path(stem)]
        if glob.has_magic(stem) and not idx_path(found[0]).exists():
            matches = {path[:-4] for end in (".bin", ".idx") for path in glob.glob(stem + end, recursive=True)}
            if not matches:
                raise ValueError(f"input {name} matches no .bin or .idx; give prefixes of data sets, or globs of them.")
            found, ending = [Path(match) for match in sorted(matches)], ""
        for prefix in found:
            endings = seen.setdefault(bin_path(prefix).resolve(), [])
            if endings and (not ending or ending in endings or "" in endings):
                raise ValueError(f"input {prefix} is listed twice: its documents would be there twice. List it once.")
            if not endings:
                prefixes.append(prefix)
            endings.append(ending)
    return prefixes


def _split(name: str) -> tuple[str, str]:
    """A name without the extension of a data set's file, and the ending."""
    match = re.fullmatch(r"(.+)(\.bin|\.idx|\.json|\.skipped\.jsonl)", name)
    return (match[1], match[2]) if match and not idx_path(Path(name)).exists() else (name, "")


def open_input(prefix: Path) -> Input:
    """Check a data set against its index and manifest, except for the ids; raises ValueError if it is corrupt."""
    index = read_index(prefix)
    path = bin_path(prefix)
    if not path.is_file():
        raise ValueError(f"there is no {path}; {idx_path(prefix).name} alone contains no tokens.")
    if fault := index_fault(index):
        raise ValueError(f"{idx_path(prefix)} is corrupt: {fault}.")
    count, tokens = len(index.documents) - 1, index.tokens
    size = tokens * index.dtype.itemsize
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, but its index says {size:,}; it is truncated or replaced."
        )
    found = manifest.read_manifest(prefix)
    if found is not None:
        said = (found.get("documents"), found.get("tokens"), found.get("dtype"))
        if said != (count, tokens, str(index.dtype)):
            raise ValueError(
                f"{manifest.manifest_path(prefix)} says {said[0]} documents and {said[1]} tokens of {said[2]}, but the "
                f"index has {count} and {tokens} of {index.dtype}: it is another data set's. Delete it to go without."
            )
    one_each = count == len(index.lengths) and _is_range(index.documents)
    return Input(prefix, found, shard_of(prefix, found), index.dtype, count, tokens, one_each)


def _is_range(values: np.ndarray, most: int = 1 << 20) -> bool:
    starts = range(0, len(values), most)
    return all(
        bool((part == np.arange(at, at + len(part))).all()) for at in starts for part in [values[at : at + most]]
    )


def shard_of(prefix: Path, found: dict[str, Any] | None) -> Shard | None:
    """Return which shard a data set is by its manifest, or by its name without one; None if it is not a shard."""
    match = _SHARD.fullmatch(str(found.get("name")) if found else prefix.name)
    if found is None:
        return Shard(match[1], int(match[2]), int(match[3])) if match else None
    index, _, count = str(found.get("shard", "0/1")).partition("/")
    if not (index.isdigit() and count.isdigit()) or int(count) < 2:
        return None
    return Shard(match[1] if match else str(found.get("name")), int(index), int(count))


def read_blocks(one: Input) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids and lengths of consecutive sequences, some megabytes at a time.

    Raises ValueError at the end if the ids are not those of the manifest's checksum.
    """
    lengths = read_index(one.prefix).lengths
    state = xxhash.xxh3_128()
    path = bin_path(one.prefix)
    with path.open("rb") as stream:
        for sequences, tokens in token_blocks(lengths):
            ids = np.fromfile(stream, dtype=one.dtype, count=tokens.stop - tokens.start)
            if len(ids) < tokens.stop - tokens.start:
                raise ValueError(f"{path} became shorter while it was read; start again.")
            state.update(ids.data)
            yield ids, lengths[sequences]
    wanted, found = (one.manifest or {}).get("bin", {}).get("checksum"), checksum_text(state)
    if wanted and wanted != found:
        raise ValueError(
            f"{path} is not what its manifest says (checksum {found}, not {wanted}): corrupt, or "
            "replaced. Rebuild it, or delete the .json to merge it as it is."
        )


# --- what is incompatible ---------------------------------------------------------------------


def check_output(prefix: Path, inputs: list[Path]) -> None:
    """Raise ValueError if the output is one of the inputs."""
    if prefix.suffix in (".bin", ".idx"):
        raise ValueError(f"--output-prefix {prefix}: leave {prefix.suffix} out; it is appended.")
    places = {bin_path(one).resolve() for one in inputs}
    if bin_path(prefix).resolve() in places:
        raise ValueError(
            f"--output-prefix {prefix} is one of the inputs; give another name, or a glob that leaves it out."
        )


def check_alike(inputs: list[Input]) -> None:
    """Raise ValueError if inputs differ in the ids' dtype, the tokenizer, or BOS and EOD, as far as it is known."""
    first = inputs[0]
    for one in inputs:
        if one.dtype != first.dtype:
            raise ValueError(
                f"{first.prefix} has ids of {first.dtype}, {one.prefix} of {one.dtype}: vocabularies of different "
                "sizes are incompatible. Tokenize both with one tokenizer."
            )
    known = [(one, _marking(one)) for one in inputs if one.manifest and one.manifest.get("tokenizer")]
    for one, marking in known:
        for what, value in marking.items():
            if known[0][1][what] != value:
                raise ValueError(
                    f"{known[0][0].prefix} and {one.prefix} differ in {what}: {known[0][1][what]} and {value}. "
                    "Data sets of one merge need the same tokenizer, BOS and EOD; preprocess one of them again."
                )


def _marking(one: Input) -> dict[str, Any]:
    """How a data set's texts became ids."""
    entry = (one.manifest or {})["tokenizer"]
    bos, eod = entry.get("prepend_bos"), entry.get("append_eod")
    return {
        "tokenizer fingerprint": entry.get("fingerprint"),
        "BOS at the start": f"id {entry.get('bos_id')}" if bos else "none",
        "EOD at the end": f"id {entry.get('eod_id')}" if eod else "none",
    }


def in_shard_order(inputs: list[Input]) -> tuple[list[Input], list[str]]:
    """Return the inputs with the shards of each run in their order, where its first one stood, and a line if it moved.

    Raises ValueError if a shard is missing or there twice, or shards were made of different inputs.
    """
    sets: dict[tuple[object, ...], list[Input]] = {}
    for one in inputs:
        if one.shard:
            sets.setdefault((one.shard.base, one.shard.of), []).append(one)
    for key, members in list(sets.items()):
        if len({_number(one) for one in members}) < len(members):  # the same name in several folders
            del sets[key]
            for one in members:
                sets.setdefault((*key, one.prefix.parent.resolve()), []).append(one)
    run_of: dict[Path, list[Input]] = {}
    for members in sets.values():
        members.sort(key=_number)
        _check_complete(members)
        _check_pieces(members)
        run_of |= {one.prefix: members for one in members}
    ordered: list[Input] = []
    placed: set[Path] = set()
    for one in inputs:
        if one.prefix not in placed:
            run = run_of.get(one.prefix, [one])
            ordered += run
            placed |= {member.prefix for member in run}
    moved = [one.shard.base for one, before in zip(ordered, inputs, strict=True) if one is not before and one.shard]
    return ordered, [f"shards are merged in their own order, not as given: {moved[0]}"] if moved else []


def _number(one: Input) -> int:
    return one.shard.number if one.shard else 0


def _check_complete(members: list[Input]) -> None:
    """members: the shards of one run, sorted."""
    base, _, count = members[0].shard or Shard("", 0, 1)
    for one, after in zip(members, members[1:], strict=False):
        if _number(one) == _number(after):
            raise ValueError(
                f"{one.prefix} and {after.prefix} are the same shard, {_number(one)}/{count}; give one of them."
            )
    there = {_number(one) for one in members}
    missing = [f"{base}.shard-{index:05}-of-{count:05}" for index in range(count) if index not in there]
    if missing:
        more = f" and {len(missing) - 8:,} more" if len(missing) > 8 else ""
        raise ValueError(
            f"{len(missing):,} of {count:,} shards of {base} are missing from --input: {', '.join(missing[:8])}{more}. "
            "Give them all, empty ones too; those that do not exist have to be preprocessed first."
        )


def _check_pieces(members: list[Input]) -> None:
    """Each file that the shards have in common is divided where the next one begins, and has not changed in between."""
    seen: dict[str, tuple[Input, dict[str, Any]]] = {}
    for one in members:
        for entry in (one.manifest or {}).get("inputs") or []:
            before, last = seen.get(entry["path"], (one, {"size": entry["size"], "end": 0}))
            if entry["size"] != last["size"] or entry.get("start", 0) != last.get("end"):
                raise ValueError(
                    f"{before.prefix.name} and {one.prefix.name} do not continue each other at {entry['path']}: the "
                    "file changed, or was not at the same place of --input. Preprocess all shards with the same inputs."
                )
            seen[entry["path"]] = one, entry
