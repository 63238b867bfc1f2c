"""Whether a run reads its data with the tokenizer that wrote them, going by the data sets' manifests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.tokenizers import TOKENIZERS, Tokenizer, TokenizerSpec, load_tokenizer


@dataclass(frozen=True)
class RunTokenizer:
    """A run's flags for its tokenizer, and what the run uses of it."""

    spec: TokenizerSpec
    """As for preprocessing; of NullTokenizer too, with its --vocab-size."""
    null_eod_id: int | None = None
    """--null-tokenizer-eod-id; None for the last id."""
    separates: bool = False
    """Keeps the documents of a sample apart by their last token (--reset-attention-mask)."""
    masks_eod: bool = False
    """Leaves out the losses of the tokens that end documents (--eod-mask-loss)."""


def check(prefixes: Sequence[str], run: RunTokenizer) -> list[str]:
    """Refuse data sets that another tokenizer wrote than the run's; those without a manifest pass.

    Returns notes for the user, on what cannot be compared. Raises ValueError with the data set, both tokenizers and
    what to do. Loads the run's tokenizer only if there is a manifest to compare it with.
    """
    entries: dict[str, dict[str, Any]] = {}
    for prefix in dict.fromkeys(prefixes):
        found = read_manifest(Path(prefix))
        if found and isinstance(found.get("tokenizer"), dict):
            entries[prefix] = found["tokenizer"]
    if not entries:
        return []
    for prefix, data in entries.items():
        if run.separates and data.get("append_eod") is False:
            raise ValueError(
                f"--reset-attention-mask finds documents by their last token, but those of {prefix} were written "
                "without one (its manifest says append_eod: false). Preprocess again with --append-eod, or drop the "
                "flag."
            )
    if run.spec.kind == "NullTokenizer":
        for prefix, data in entries.items():
            _check_null(prefix, data, run)
        return []
    reason = unknown(run.spec)
    if reason:
        return [f"not compared with the tokenizer that wrote the data: {reason}"]
    tokenizer = _load(run.spec, next(iter(entries)))
    for prefix, data in entries.items():
        if data.get("fingerprint") != tokenizer.fingerprint:
            raise ValueError(_mismatch(prefix, data, run.spec, tokenizer))
        _check_eod(prefix, data, run, tokenizer.eod_id, "Give the tokenizer folder whose eos_token it is")
    return []


def first_known(prefixes: Sequence[str]) -> str | None:
    """Return the first data set whose manifest names a tokenizer; None if there is none."""
    known = (p for p in dict.fromkeys(prefixes) if (read_manifest(Path(p)) or {}).get("tokenizer"))
    return next(known, None)


def unknown(spec: TokenizerSpec) -> str:
    """Return why a run's tokenizer has no fingerprint; empty if it has one."""
    if spec.kind not in TOKENIZERS:
        return f"{spec.kind} has no fingerprint"
    if spec.kind == "HuggingFaceTokenizer":
        model = spec.model or Path()
        if not model.exists():
            return f"{model} is a name on a hub; give --tokenizer-model a local folder to have it compared"
        if model.is_dir() and not (model / "tokenizer.json").is_file():
            return f"{model} contains no tokenizer.json"
    return ""


def _load(spec: TokenizerSpec, prefix: str) -> Tokenizer:
    try:
        return load_tokenizer(spec)
    except ValueError as error:
        raise ValueError(
            f"the run's tokenizer cannot be compared with the one that wrote {prefix}: {error} (Without "
            f"{manifest_path(Path(prefix))} nothing is compared.)"
        ) from None


def _check_null(prefix: str, data: dict[str, Any], run: RunTokenizer) -> None:
    """A NullTokenizer reads data of any tokenizer, if its ids are among the model's."""
    needed = data.get("vocab_size")
    if needed is not None and run.spec.vocab_size < needed:
        raise ValueError(
            f"--vocab-size {run.spec.vocab_size} is too small for {prefix}: {_named(data)} wrote it, which has "
            f"{needed:,} tokens. Give --vocab-size {needed}."
        )
    eod = run.spec.vocab_size - 1 if run.null_eod_id is None else run.null_eod_id
    _check_eod(prefix, data, run, eod, f"Give --null-tokenizer-eod-id {data.get('eod_id')}")


def _check_eod(prefix: str, data: dict[str, Any], run: RunTokenizer, eod: int | None, remedy: str) -> None:
    flag = "--reset-attention-mask" if run.separates else "--eod-mask-loss" if run.masks_eod else None
    if flag and data.get("append_eod") and data.get("eod_id") != eod:
        raise ValueError(
            f"{flag} looks for token {eod} at the end of a document, but the documents of {prefix} end with token "
            f"{data.get('eod_id')}. {remedy}, or drop the flag."
        )


def _mismatch(prefix: str, data: dict[str, Any], spec: TokenizerSpec, tokenizer: Tokenizer) -> str:
    own = {"type": spec.kind, "model": spec.model, "fingerprint": tokenizer.fingerprint}
    if data.get("type") == "ByteTokenizer":
        remedy = f"--tokenizer-type NullTokenizer --vocab-size {data.get('vocab_size')}"
    else:
        remedy = f"--tokenizer-type {data.get('type')} --tokenizer-model {data.get('model')}"
    if data.get("type") == "TikTokenizer":
        remedy += " with its --tiktoken-* flags and --vocab-size"
    return (
        f"{prefix} was written with another tokenizer than the run's, so its ids mean other words.\n"
        f"  the data: {_named(data)}\n  the run:  {_named(own)}\n"
        f"Give {remedy}, or preprocess the text again with the run's tokenizer. (Without {manifest_path(Path(prefix))} "
        "nothing is compared.)"
    )


def _named(entry: dict[str, Any]) -> str:
    """Type, file and first digits of a tokenizer."""
    digits = str(entry.get("fingerprint")).removeprefix("sha256:")[:8]
    return " ".join(str(part) for part in (entry.get("type"), entry.get("model"), f"({digits})") if part)
