"""What is in a data set: figures, lengths, and documents as text."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid import pictures
from megatron_hybrid.data import manifest
from megatron_hybrid.data.indexed import Index, bin_path, idx_path, read_index
from megatron_hybrid.data.tokenizers import Tokenizer, TokenizerSpec, load_tokenizer
from megatron_hybrid.data.verify import document_lengths, index_fault


def read_whole_index(prefix: Path) -> Index:
    """Map PREFIX.idx; raises ValueError if it is corrupt or PREFIX.bin has another size."""
    index = read_index(prefix)
    fault = index_fault(index)
    path = bin_path(prefix)
    if not fault and not path.is_file():
        raise ValueError(f"there is no {path}; give the prefix of a .bin/.idx pair.")
    if not fault and path.stat().st_size != index.tokens * index.dtype.itemsize:
        fault = f"it has {index.tokens:,} tokens, but {path} has {path.stat().st_size:,} bytes"
    if fault:
        raise ValueError(f"{idx_path(prefix)}: {fault}. --verify lists all that is wrong.")
    return index


# --- figures ---------------------------------------------------------------------------------------


def statistics(prefix: Path) -> dict[str, Any]:
    """Return the figures of a data set; those of the manifest are None without one.

    Lengths are tokens of documents; the percentiles are exact (the length of the document of that rank). Raises
    ValueError for a corrupt index.
    """
    index = read_whole_index(prefix)
    said = manifest.read_manifest(prefix) or {}
    encoded = said.get("encoded") or {}
    count = len(index.documents) - 1
    return {
        "prefix": str(prefix),
        "documents": count,
        "sequences": len(index.lengths),
        "tokens": index.tokens,
        "text_tokens": _text_tokens(said, count, index.tokens),
        "dtype": str(index.dtype),
        "bin_bytes": bin_path(prefix).stat().st_size,
        "idx_bytes": idx_path(prefix).stat().st_size,
        "lengths": _length_figures(lambda: document_lengths(index), count),
        "histogram": histogram(document_lengths(index)),
        "tokenizer": said.get("tokenizer"),
        "text_bytes": encoded.get("text_bytes"),
        "bytes_per_token": encoded.get("bytes_per_token"),
        "empty": encoded.get("empty"),
        "filtered": encoded.get("filtered"),
        "duplicates": said.get("duplicates"),
        "skipped": said.get("skipped"),
        "shard": said.get("shard"),
        "merged": len(said["merged"]) if said.get("merged") else None,
        "manifest": bool(said),
    }


def _text_tokens(said: dict[str, Any], documents: int, tokens: int) -> int | None:
    """Tokens without BOS and EOD; None if it is not known whether there are any."""
    entry = said.get("tokenizer")
    return tokens - documents * (entry["prepend_bos"] + entry["append_eod"]) if entry else None


def _length_figures(blocks: Callable[[], Iterable[np.ndarray]], count: int) -> dict[str, Any]:
    names = ("min", "median", "mean", "p95", "max")
    if not count:
        return dict.fromkeys(names)
    ranks = {"min": 0, "median": (count - 1) // 2, "p95": math.ceil(0.95 * count) - 1, "max": count - 1}
    found = order_statistics(blocks, list(ranks.values()))
    total = sum(int(block.sum()) for block in blocks())
    figures = {**dict(zip(ranks, found, strict=True)), "mean": total / count}
    return {name: figures[name] for name in names}


def order_statistics(blocks: Callable[[], Iterable[np.ndarray]], ranks: list[int]) -> list[int]:
    """Return the values of some ranks (0 is the least) among many, exactly and in little memory.

    blocks: gives all values, int64 and not negative, as often as it is called: once for each 16 bits of the greatest
    value, from the highest down; each time the values are counted that share the bits found so far.
    """
    greatest = max((int(block.max()) for block in blocks() if len(block)), default=0)
    known = [(0, rank) for rank in ranks]  # the higher bits, and the rank among the values that share them
    for shift in reversed(range(0, max(1, greatest.bit_length()), 16)):
        counts = {high: np.zeros(1 << 16, dtype=np.int64) for high, _ in known}
        for block in blocks():
            upper = block >> (shift + 16)
            for high, count in counts.items():
                count += np.bincount((block[upper == high] >> shift) & 0xFFFF, minlength=1 << 16)
        known = [_narrow(counts[high], high, rank) for high, rank in known]
    return [value for value, _ in known]


def _narrow(counts: np.ndarray, high: int, rank: int) -> tuple[int, int]:
    ends = np.cumsum(counts)
    digit = int(np.searchsorted(ends, rank, side="right"))
    return high << 16 | digit, rank - (int(ends[digit - 1]) if digit else 0)


def histogram(blocks: Iterable[np.ndarray]) -> dict[str, dict[str, int]]:
    """Count documents and their tokens by powers of two: key ``"64"`` is for lengths of 64 to 127, ``"0"`` for 0."""
    documents, tokens = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=np.int64)
    for lengths in blocks:
        digits = np.frexp(lengths.astype(np.float64))[1]  # binary digits, exact below 2^53
        documents += np.bincount(digits, minlength=64)
        np.add.at(tokens, digits, lengths)
    return {
        str(1 << digits >> 1): {"documents": int(documents[digits]), "tokens": int(tokens[digits])}
        for digits in np.flatnonzero(documents).tolist()
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as aligned lines; what is not known is left out."""
    lengths, entry = figures["lengths"], figures["tokenizer"]
    rows: list[tuple[str, str]] = [
        (name, f"{figures[name]:,}") for name in ("documents", "sequences", "tokens") if figures[name] is not None
    ]
    if figures["text_tokens"] not in (None, figures["tokens"]):
        rows.append(("  without BOS and EOD", f"{figures['text_tokens']:,}"))
    rows += [("dtype", figures["dtype"]), (".bin, .idx", f"{figures['bin_bytes']:,} + {figures['idx_bytes']:,} bytes")]
    if figures["documents"]:
        rows.append(("tokens of a document", f"min {lengths['min']:,}  median {lengths['median']:,}"))
        rows.append(("", f"mean {lengths['mean']:,.1f}  95 % {lengths['p95']:,}  max {lengths['max']:,}"))
    if entry:
        marks = [f"BOS {entry['bos_id']} at the start"] * entry["prepend_bos"]
        marks += [f"EOD {entry['eod_id']} at the end"] * entry["append_eod"]
        rows.append(("tokenizer", f"{entry['type']}, vocabulary {entry['vocab_size']:,}"))
        rows += [("", str(entry["model"]))] if entry["model"] else []
        rows += [("", entry["fingerprint"]), ("marks of a document", ", ".join(marks) or "none")]
    if figures["bytes_per_token"]:
        rows.append(("bytes per token", f"{figures['bytes_per_token']:.3f} ({figures['text_bytes']:,} bytes of text)"))
    left_out = {"empty": figures["empty"], **(figures["filtered"] or {}), "duplicates": figures["duplicates"]}
    left_out["bad records"] = figures["skipped"]
    if any(count is not None for count in left_out.values()):
        known = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
        rows.append(("left out", known or "none"))
    if figures["shard"] not in (None, "0/1"):
        rows.append(("shard", figures["shard"]))
    if figures["merged"]:
        rows.append(("merged of", f"{figures['merged']:,} data sets"))
    if not figures["manifest"]:
        rows.append(("manifest", "none"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


# --- documents -------------------------------------------------------------------------------------


def parse_numbers(texts: list[str], count: int) -> list[int]:
    """Return the documents that numbers and ranges name, as in Python: ``-1`` is the last, ``3:6`` is 3, 4 and 5.

    Raises ValueError for what is not a number, or is outside of ``count`` documents.
    """
    found: list[int] = []
    for text in texts:
        first, colon, last = text.partition(":")
        try:
            bounds = [int(part) if part else None for part in (first, last)]
        except ValueError:
            bounds = [None, None]
            colon = ""
        if colon:
            chosen = list(range(count)[slice(*bounds)])
        else:
            chosen = [] if bounds[0] is None or not -count <= bounds[0] < count else [bounds[0] % count]
        if not chosen:
            raise ValueError(
                f"--documents {text}: there are {count:,} documents, from 0 to {count - 1:,}; give numbers, -1 for the "
                "last, or ranges such as 3:6."
            )
        found += chosen
    return found


def read_document(prefix: Path, index: Index, number: int) -> np.ndarray:
    """Return the token ids of one document, ``[tokens]``."""
    first, last = int(index.documents[number]), int(index.documents[number + 1])
    if first == last:
        return np.empty(0, dtype=index.dtype)
    count = int(index.lengths[first:last].sum(dtype=np.int64))
    return np.fromfile(bin_path(prefix), dtype=index.dtype, count=count, offset=int(index.offsets[first]))


def tokenizer_of(said: dict[str, Any] | None, given: TokenizerSpec | None) -> Tokenizer:
    """Load the tokenizer that is given, else the one that a manifest names.

    Raises ValueError if there is none, or it is not the one that made the data.
    """
    entry = (said or {}).get("tokenizer")
    if given is None:
        if entry is None:
            raise ValueError("no manifest names a tokenizer; give --tokenizer-model FILE, or --tokens to see the ids.")
        model = Path(entry["model"]) if entry["model"] else None
        if model is not None and not model.exists():
            raise ValueError(
                f"the tokenizer that the manifest names, {model}, is not there (relative paths are taken from here); "
                "give --tokenizer-model FILE, or --tokens to see the ids."
            )
        settings = {name: entry[name] for name in ("pattern", "num_special_tokens") if name in entry}
        given = TokenizerSpec(entry["type"], model, vocab_size=entry["vocab_size"], **settings)
    tokenizer = load_tokenizer(given)
    if entry is not None and tokenizer.fingerprint != entry["fingerprint"]:
        raise ValueError(
            f"tokenizer {given.model or given.kind} is not the one that made the data (fingerprint "
            f"{tokenizer.fingerprint}, not {entry['fingerprint']}); its text would be nonsense. Give the right one"
            + (", with its --tiktoken-... flags." if given.kind == "TikTokenizer" else ".")
        )
    return tokenizer


def show_documents(
    prefix: Path, index: Index, numbers: list[int], tokenizer: Tokenizer | None, max_chars: int
) -> Iterator[str]:
    """Yield each document with a line above it; as ids without a tokenizer.

    max_chars: characters of the text that are shown; 0 for all. Raises ValueError if an id is not the tokenizer's.
    """
    for number in numbers:
        ids = read_document(prefix, index, number)
        sequences = int(index.documents[number + 1] - index.documents[number])
        several = f" in {sequences:,} sequences" if sequences != 1 else ""
        if tokenizer is not None and len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ValueError(
                f"document {number} has the ids {ids.min()} to {ids.max()}, but the tokenizer's vocabulary is "
                f"{tokenizer.vocab_size:,}; it is not the one that made the data."
            )
        text = " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids.tolist())
        shown, cut = text, ""
        if 0 < max_chars < len(text):
            shown, cut = text[:max_chars], f", the first {max_chars:,} of {len(text):,} characters"
        yield f"--- document {number:,}: {len(ids):,} tokens{several}{cut}\n{shown}"


# --- picture ---------------------------------------------------------------------------------------


def draw_histogram(figures: dict[str, Any], path: Path) -> None:
    """Draw how many documents there are of each length, and their share of the tokens, as a PNG.

    figures: of :func:`statistics`. Raises ValueError if there is nothing to draw.
    """
    bins = {int(length): counts for length, counts in figures["histogram"].items() if int(length) > 0}
    if not bins:
        raise ValueError(f"--histogram: {figures['prefix']} has no document with a token; there is nothing to draw.")
    pyplot = pictures.pyplot()
    from matplotlib.ticker import FuncFormatter

    left = list(range(min(bins).bit_length() - 1, max(bins).bit_length()))
    documents = [bins.get(1 << at, {"documents": 0})["documents"] for at in left]
    shares = [100 * bins.get(1 << at, {"tokens": 0})["tokens"] / figures["tokens"] for at in left]
    figure, panels = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for panel, heights, label, colour in (
        (panels[0], documents, "documents", "tab:blue"),
        (panels[1], shares, "share of tokens (%)", "tab:orange"),
    ):
        panel.bar([at + 0.5 for at in left], heights, width=0.94, color=colour)
        panel.set_ylabel(label)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        for name, style in (("median", "--"), ("p95", ":")):
            if figures["lengths"][name]:
                title = {"median": "median", "p95": "95 %"}[name]
                at = math.log2(figures["lengths"][name])
                panel.axvline(at, color="black", linestyle=style, label=f"{title}: {figures['lengths'][name]:,}")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0].legend(title="tokens of a document")
    panels[1].set_xticks([*left, left[-1] + 1], [_short(1 << at) for at in [*left, left[-1] + 1]])
    panels[1].set_xlabel("tokens of a document")
    name = Path(figures["prefix"]).name
    panels[0].set_title(f"{name}: {figures['documents']:,} documents, {figures['tokens']:,} tokens")
    pictures.save(figure, path, dpi=120)


def _short(number: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)
