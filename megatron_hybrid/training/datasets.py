"""The data of a run: which they are, whether they fit its model, and where the order of their documents is kept."""

import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid.argv import flag_name
from megatron_hybrid.data import ids
from megatron_hybrid.data.blend import DEFAULT_SPLIT
from megatron_hybrid.data.contents import Contents, examine
from megatron_hybrid.data.indexed import bin_path, read_index
from megatron_hybrid.files import atomic_write

SOURCES = ("mock_data", "data_path", "data_args_path", "per_split_data_args_path")
SPLIT_PATHS = ("train_data_path", "valid_data_path", "test_data_path")
CACHE = "ContentGPTDataset_indices"
"""Upstream keeps the order of documents in PREFIX/cache/CLASS_indices (core/datasets/gpt_dataset.py:472)."""
_SAY_EVERY_S = 30.0

Ask = Callable[[Path], list[str]]


class Blend(NamedTuple):
    """The data sets that are drawn from, as Megatron has them."""

    prefixes: list[str]
    weights: list[float] | None


class Blends(NamedTuple):
    """The blends that the flags name; both None for mock data."""

    whole: Blend | None = None
    """Of all parts of --split."""
    per_split: list[Blend | None] | None = None
    """In its place one for each of train, valid and test, None for a part that is not there."""

    def all(self) -> list[Blend]:
        return [one for one in self.per_split or [self.whole] if one is not None]


def blends(args: Namespace) -> Blends:
    """The blends that the flags name. Nothing else asks Megatron for them.

    Raises:
        ValueError: Flags that exclude each other, files that are not there or not such lists, weights that are none.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    given = [name for name in SOURCES if getattr(args, name)]
    given += ["train/valid/test_data_path"] if any(getattr(args, name) for name in SPLIT_PATHS) else []
    flags = [flag_name(name) for name in given]
    if len(flags) > 1:
        raise ValueError(f"{' and '.join(flags)} each name the data, and Megatron would read one of them: drop one.")
    if args.mock_data or not given:
        return Blends()
    file = args.data_args_path or args.per_split_data_args_path
    if file and not Path(file).is_file():
        raise ValueError(f"There is no file {file}, which is given as the list of data.")
    per_split = given[0] in ("per_split_data_args_path", "train/valid/test_data_path")
    if per_split and args.split is not None:
        raise ValueError(
            f"--split {args.split} cuts one set of data, and {flags[0]} has them cut already: drop --split."
        )
    if args.per_split_data_args_path:
        _check_per_split_file(args.per_split_data_args_path)
    try:
        blend, per_split_blends = get_blend_and_blend_per_split(args)
    except (AssertionError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{flags[0]} is no list of data ({type(error).__name__}: {error}): give PREFIX, several of them, or WEIGHT "
            "PREFIX pairs."
        ) from None
    found = Blends(
        Blend(*blend) if blend else None,
        [Blend(*one) if one else None for one in per_split_blends] if per_split_blends else None,
    )
    for one in found.all():
        _check_weights(flags[0], one)
    return found


def _check_per_split_file(file: str) -> None:
    try:
        parts = json.loads(Path(file).read_text())
        wrong = "" if {"train", "valid", "test"} <= set(parts) else f"it has {', '.join(parts) or 'nothing'}"
    except (ValueError, TypeError) as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"--per-split-data-args-path {file} is not a JSON object with train, valid and test, each a list of data "
            f"or null ({wrong})."
        )


def _check_weights(flag: str, blend: Blend) -> None:
    wrong = [weight for weight in blend.weights or () if not 0 < weight < float("inf")]
    if wrong:
        raise ValueError(
            f"{flag} has the weight {wrong[0]:g}: weights are numbers above 0. Drop a data set that is not to be drawn."
        )
    if not blend.prefixes:
        raise ValueError(f"{flag} names no data: give the prefix of a .bin/.idx pair.")
    for word in blend.prefixes if blend.weights is None else ():
        if word.replace(".", "", 1).isdigit() and not Path(f"{word}.idx").is_file():
            raise ValueError(f"{flag} has {word} where a data set stands: give WEIGHT PREFIX pairs, or prefixes alone.")


def prefixes(args: Namespace) -> list[str]:
    """Each data set that the flags name, or the files that they name do, once.

    Raises:
        ValueError: As :func:`blends`.
    """
    return list(dict.fromkeys(prefix for blend in blends(args).all() for prefix in blend.prefixes))


def check_content(args: Namespace) -> list[str]:
    """Refuses data sets that are damaged or that the model has no rows for; chooses where their order is kept.

    For training and evaluation alike, before the model is built. Rank 0 reads the indices; where no manifest says which
    ids there are, all ranks read their shares of them, once for each content. All ranks come to one result.

    Args:
        args: Megatron's, validated; ``padded_vocab_size`` as the model will have it. ``data_contents`` (fingerprints
            by prefix), and ``data_cache_path`` where the data's own folders cannot be written, are set on all ranks.

    Returns:
        Notes for the user.

    Raises:
        ValueError: On all ranks alike, with the data set and the remedy.
        Unreachable: Files or ranks do not answer.
    """
    from megatron_hybrid.checkpoint.agreement import among_ranks  # with torch, which a look at the flags does without

    names = prefixes(args)
    if not names:
        return []
    if args.data_args_path and args.split is None:
        args.split = DEFAULT_SPLIT  # as upstream does for --data-path

    def scan_share(prefix: Path, part: int, parts: int) -> list[str]:
        return [json.dumps(_scan(prefix, part, parts))]

    found = among_ranks(args, lambda ask: _decide(args, names, ask), scan_share, "the data", _bytes)
    args.data_contents = found["contents"]
    args.data_cache_path = found["cache"]
    return found["notes"]


def _decide(args: Namespace, names: Sequence[str], ask: Ask) -> dict[str, Any]:
    """On rank 0: fingerprints of the data, the folder for their order, and notes."""
    contents = [examine(name) for name in names]
    cache, notes = _cache_folder(args, names)
    first: dict[str, str] = {}
    for one in contents:
        notes += _check_ids(args, one, cache or _own_cache(one.prefix), ask)
        if (twin := first.setdefault(one.content, one.prefix)) != one.prefix:
            notes.append(f"{twin} and {one.prefix} are the same data under two names, and both are drawn from")
    return {"contents": {one.prefix: one.content for one in contents}, "cache": cache, "notes": notes}


# --- the ids -----------------------------------------------------------------------------------------


def _check_ids(args: Namespace, data: Contents, cache: Path | str, ask: Ask) -> list[str]:
    """Refuses ids without a row in the model's embedding; a note on those whose row is padding.

    A lookup beyond the table is an IndexError on one rank, and tensor-parallel ranks look up zeros without an error
    (core/tensor_parallel/layers.py:359).
    """
    from megatron.training import global_vars

    declared, rows = global_vars.get_tokenizer().vocab_size, args.padded_vocab_size
    if data.known is None and data.limit is not None and data.limit <= declared:
        return []
    found = data.known or _cached_range(data, Path(cache), ask)
    if found is None or not found.fault(min(declared, rows)):
        return []
    if found.least < 0:
        raise ValueError(
            f"{data.prefix} has negative token ids (the least is {found.least:,}): Megatron takes -1 for padding, and "
            "others have no row in the embedding. Preprocess the text again."
        )
    needed = found.greatest + 1
    if needed <= rows:
        return [
            f"{data.prefix} has token ids up to {found.greatest:,}, beyond the tokenizer's vocabulary of {declared:,}: "
            f"they take rows that pad it to {rows:,}"
        ]
    if args.tokenizer_type.startswith("Null"):
        remedy = f"Give --vocab-size {needed}, or data of fewer ids."
    else:
        multiple = 128 * -(-needed // (128 * args.tensor_model_parallel_size))
        remedy = (
            "Give data that the run's tokenizer wrote; if it did write these, its ids have gaps, and "
            f"--make-vocab-size-divisible-by {multiple} makes rows for all of them."
        )
    raise ValueError(
        f"{data.prefix} has token ids up to {found.greatest:,}, but the model has {rows:,} rows for them (the "
        f"tokenizer's vocabulary of {declared:,}, padded). {remedy}"
    )


def _cached_range(data: Contents, cache: Path, ask: Ask) -> ids.Range | None:
    """The range of a data set's ids, which the ranks find out together; kept beside the order of its documents."""
    path = bin_path(Path(data.prefix))
    key = f"{data.content.rpartition(':')[2]}-{path.stat().st_mtime_ns:x}"  # the fingerprint does not cover all bytes
    file = cache / f"ids-{key}.json"
    try:
        return _range(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    found = ids.union(_range(json.loads(text)) for text in ask(Path(data.prefix)))
    try:
        with atomic_write(file) as stream:
            stream.write(json.dumps(found).encode())
    except OSError:
        pass  # it is found out again then
    return found


def _range(noted: Sequence[int] | None) -> ids.Range | None:
    return ids.Range(*noted) if noted is not None else None


def _scan(prefix: Path, part: int, parts: int) -> ids.Range | None:
    """The range of one rank's share of a data set's ids; rank 0 says how far it is, where that takes long."""
    dtype, size = read_index(prefix).dtype, _bytes(prefix) / parts
    done, said = 0, time.monotonic()

    def progress(block: Any) -> None:
        nonlocal done, said
        done += block.nbytes
        if part == 0 and time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            print(f"reading the token ids of {prefix}, once: {100 * done / size:.0f}%", flush=True)

    return ids.scan(bin_path(prefix), dtype, part, parts, progress)


def _bytes(prefix: Path) -> int:
    return bin_path(prefix).stat().st_size


# --- where the order is kept -------------------------------------------------------------------------


def _own_cache(prefix: str) -> Path:
    return Path(prefix, "cache", CACHE)


def _cache_folder(args: Namespace, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder for the order of documents (None: beside the data), and a note where that is not the usual one.

    Raises:
        ValueError: --data-cache-path, or every folder that would do, cannot be written.
    """
    if args.data_cache_path:
        built = (
            args.dataloader_fast_cache_load or args.dataloader_defer_npy_index_mmap
        )  # by an earlier run, so only read
        if not built and (reason := _unwritable(Path(args.data_cache_path))):
            raise ValueError(
                f"--data-cache-path {args.data_cache_path} cannot be written ({reason}): the order of the documents is "
                "kept there. Give a folder that can, on a file system that all nodes see."
            )
        return args.data_cache_path, []
    wrong = next((f"{at}: {reason}" for name in names if (reason := _unwritable(at := _own_cache(name)))), None)
    if wrong is None:
        return None, []
    tried = [Path(args.save, "index_cache")] if args.save and not args.skip_train else []  # a look leaves a run alone
    if int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) == args.world_size:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        tried += [home / "megatron_hybrid" / "index_cache"]
        tried += [Path(tempfile.gettempdir(), f"megatron_hybrid-{os.getuid()}", "index_cache")]
    for folder in tried:
        if not _unwritable(folder):
            return str(folder), [
                f"the order of the documents is kept in {folder}: beside the data is no place ({wrong})"
            ]
    raise ValueError(
        f"The order of the documents cannot be kept beside the data ({wrong}): give --data-cache-path FOLDER, on a "
        "file system that all nodes see."
    )


def _unwritable(folder: Path) -> str:
    """Why no file can be written in a folder, which is made if need be; empty if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
