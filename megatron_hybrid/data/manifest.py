"""The manifest of a data set: PREFIX.json, next to PREFIX.bin and PREFIX.idx."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

import megatron_hybrid
from megatron_hybrid.data import ids
from megatron_hybrid.data.indexed import bin_path, idx_path, read_index
from megatron_hybrid.data.tokenizers import Tokenizer, TokenizerSpec
from megatron_hybrid.files import checksum, checksum_text

FORMAT = 1


def manifest_path(prefix: Path) -> Path:
    """Return PREFIX.json."""
    return prefix.with_name(prefix.name + ".json")


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """Return the content of PREFIX.json; None without one. Raises ValueError if it is not a manifest."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it to go without a manifest.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of this version; delete it to go without one.")
    return found


def tokenizer_entry(tokenizer: Tokenizer, spec: TokenizerSpec, prepend_bos: bool, append_eod: bool) -> dict[str, Any]:
    """Return how texts became ids."""
    tiktoken = spec.kind == "TikTokenizer"
    return {
        "type": spec.kind,
        "model": str(spec.model) if spec.model else None,
        **({"pattern": spec.pattern, "num_special_tokens": spec.num_special_tokens} if tiktoken else {}),
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eod_id": tokenizer.eod_id,
        "prepend_bos": prepend_bos,
        "append_eod": append_eod,
    }


class Scanned(NamedTuple):
    """What one pass over a PREFIX.bin has found."""

    checksum: str
    ids: ids.Range | None
    """None if there are none."""


def describe(prefix: Path, files: Path | None = None, scanned: Scanned | None = None, **fields: Any) -> dict[str, Any]:
    """Return a manifest: the figures that follow from the files, and ``fields``.

    prefix: the name in the manifest; files: where the files are now, if elsewhere; scanned: of the .bin, if it is known
    already.
    """
    files = files or prefix
    index = read_index(files)
    scanned = scanned or _scan(files, index.dtype)
    return {
        "format": FORMAT,
        "tool": f"megatron_hybrid {megatron_hybrid.__version__}",
        "name": prefix.name,
        "documents": len(index.documents) - 1,
        "tokens": index.tokens,
        "dtype": str(index.dtype),
        "ids": {"min": scanned.ids.least, "max": scanned.ids.greatest} if scanned.ids else None,
        "bin": {"size": bin_path(files).stat().st_size, "checksum": scanned.checksum},
        "idx": {"size": idx_path(files).stat().st_size, "checksum": checksum(idx_path(files))},
        "lengths": length_statistics(index.lengths),
        **fields,
    }


def _scan(files: Path, dtype: np.dtype) -> Scanned:
    state = xxhash.xxh3_128()
    found = ids.scan(bin_path(files), dtype, each=lambda block: state.update(block.data))
    return Scanned(checksum_text(state), found)


def known_ids(said: dict[str, Any] | None) -> ids.Range | None:
    """Return the range of ids that a manifest notes; None if it does not, or there is none."""
    noted = (said or {}).get("ids")
    return ids.Range(noted["min"], noted["max"]) if noted else None


def noted_files(said: dict[str, Any]) -> tuple[int | None, str | None]:
    """Return the size of .bin and the checksum of .idx that a manifest notes."""
    entries = {end: entry for end in ("bin", "idx") if isinstance(entry := said.get(end), dict)}
    return entries.get("bin", {}).get("size"), entries.get("idx", {}).get("checksum")


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """Return least, greatest and mean number of tokens, and how many sequences there are for each power of two.

    The histogram's key ``"64"`` counts those of 64 to 127 tokens.
    """
    counts = np.zeros(32, dtype=np.int64)
    least, greatest, total = None, 0, 0
    for block in _blocks(lengths):
        # frexp's exponent, exact for int32, is the number of binary digits.
        counts += np.bincount(np.frexp(block)[1], minlength=32)[:32]
        least = int(block.min()) if least is None else min(least, int(block.min()))
        greatest, total = max(greatest, int(block.max())), total + int(block.sum(dtype=np.int64))
    histogram = {str(1 << digits >> 1): int(count) for digits, count in enumerate(counts) if count}
    mean = total / len(lengths) if len(lengths) else None
    return {"min": least, "max": greatest if len(lengths) else None, "mean": mean, "histogram": histogram}


def _blocks(lengths: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(lengths), 1 << 20):
        yield lengths[start : start + (1 << 20)]


def to_json(manifest: dict[str, Any]) -> bytes:
    """Return the text of a PREFIX.json."""
    return (json.dumps(manifest, indent=1) + "\n").encode()
