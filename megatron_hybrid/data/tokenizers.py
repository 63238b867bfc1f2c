"""Tokenizers for preprocessing, with the ids that Megatron's tokenizer of the same type gives.

The fingerprint of a tokenizer depends only on what decides its ids, so that a manifest shows whether a run reads the
data with the tokenizer that wrote them, wherever its files are.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Ids(NamedTuple):
    """Token ids of several texts."""

    ids: np.ndarray
    """All ids, one text after the other, ``[tokens]``, any integer type."""
    lengths: np.ndarray
    """Tokens of each text, ``[texts]``, int64."""


def split(ids: Ids) -> list[np.ndarray]:
    """Return the ids of each text."""
    return np.split(ids.ids, np.cumsum(ids.lengths)[:-1]) if len(ids.lengths) else []


def join(parts: list[np.ndarray]) -> Ids:
    """Return the ids of several texts as one."""
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    return Ids(np.concatenate(parts) if parts else np.empty(0, dtype=np.int32), lengths)


class Tokenizer(Protocol):
    """What preprocessing asks of a tokenizer. One object serves one thread at a time."""

    vocab_size: int
    """One more than the largest id, before Megatron pads it."""
    bos_id: int | None
    """Id that starts a document, if the tokenizer has one."""
    eod_id: int | None
    """Id that ends a document, if the tokenizer has one."""
    fingerprint: str
    """``sha256:...`` of what decides the ids."""

    def encode(self, texts: list[str]) -> Ids:
        """Return the ids of the texts, without any that start or end a document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids; those of special tokens show as such where the library can."""
        ...


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer, in Megatron's terms."""

    kind: str
    """As --tokenizer-type has it: one of TOKENIZERS."""
    model: Path | None = None
    """Its file or folder (--tokenizer-model)."""
    bos_token: str | None = None
    eod_token: str | None = None
    """Hugging Face only: tokens by name, instead of those that the folder's tokenizer_config.json names."""
    pattern: str = "v2"
    num_special_tokens: int = 1000
    vocab_size: int = 131072
    """TikTokenizer only: --tiktoken-pattern, --tiktoken-num-special-tokens, --vocab-size; upstream's defaults."""


def guess_kind(model: Path) -> str:
    """Return the tokenizer type of a file or folder by its name; raises ValueError if that says nothing."""
    if model.is_dir() or model.name == "tokenizer.json":
        return "HuggingFaceTokenizer"
    if model.suffix == ".model":
        return "SentencePieceTokenizer"
    raise ValueError(f"the name of {model} does not say what tokenizer it is; give --tokenizer-type.")


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Load the tokenizer of a spec; raises ValueError if it cannot, with the reason."""
    if spec.kind not in TOKENIZERS:
        raise ValueError(f"tokenizer type {spec.kind!r} is not supported; the types are: {', '.join(TOKENIZERS)}.")
    if spec.model is None and spec.kind != "ByteTokenizer":
        raise ValueError(f"--tokenizer-type {spec.kind} needs its file: give --tokenizer-model.")
    return TOKENIZERS[spec.kind](spec)


class SentencePieceTokenizer:
    """A SentencePiece model; the ids are those of Megatron's SentencePieceTokenizer.

    Source of the end of document (the model's EOS): ``eod`` in upstream's
    core/tokenizers/text/libraries/abstract_tokenizer.py.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        """Load a model; raises ValueError if there is none, or one that changes the text."""
        import sentencepiece

        model = _existing(spec.model)
        if not model.is_file():
            raise ValueError(f"tokenizer model {model} is a folder; a SentencePiece model is a file.")
        content = model.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise ValueError(f"tokenizer model {model} is not a SentencePiece model.") from None
        if self._model.encode("x  y") == self._model.encode("x y"):
            # Upstream encodes such text by a detour (extra_space_token); not supported here.
            raise ValueError(
                f"tokenizer model {model} drops repeated spaces, so code and tables cannot be "
                "restored from its ids; train one with remove_extra_whitespaces=false."
            )
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eod_id = _id_or_none(self._model.eos_id())
        self.fingerprint = _sha256(content)

    def encode(self, texts: list[str]) -> Ids:
        """Return the ids of the texts."""
        return join(self._model.encode(texts, num_threads=1, return_type="numpy"))

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids; control tokens by name."""
        parts: list[str] = []
        held: list[int] = []
        for token in ids:
            if self._model.is_control(token):
                parts += [self._model.decode(held), self._model.id_to_piece(token)]
                held = []
            else:
                held.append(token)
        return "".join([*parts, self._model.decode(held)])


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the Hugging Face tokenizers library, or a folder that contains one.

    The ids are those of Megatron's HuggingFaceTokenizer with --tokenizer-hf-no-include-special-tokens: the tokens that
    a post-processor would add are left to --prepend-bos and --append-eod. Those two tokens, and tokens that
    ``tokenizer.json`` lacks, come from the files next to it, as in Megatron (:mod:`.special_tokens`).

    Attributes:
        builder: The class that transformers may rebuild; training compares its ids with these. Often empty.
        content: A ``tokenizer.json`` with all added tokens.
        vocabulary: All tokens and their ids.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        """Load the file; raises ValueError if it is not one of the library's."""
        import os

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are ours, one tokenizer each
        import tokenizers

        from megatron_hybrid.data.special_tokens import add_special_tokens

        self.file = file = _tokenizer_json(_existing(spec.model))
        self.content = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{file} is not a Hugging Face tokenizer: {error}.") from None
        config, saved = json.loads(self.content), self._added()
        special = add_special_tokens(self._tokenizer, file)
        if self._added() != saved:
            config["added_tokens"] = self._added()
            self.content = json.dumps(config).encode()
        self._tokenizer.no_truncation()  # settings for inference, which a file may carry
        self._tokenizer.no_padding()
        self.builder = special.builder
        self.vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # ids may have gaps, and two tokens one id
        self.vocab_size = max(len(self.vocabulary), max(self.vocabulary.values()) + 1)
        self.bos_id = _token_id(self.vocabulary, spec.bos_token, "--bos-token", special.bos)
        self.eod_id = _token_id(self.vocabulary, spec.eod_token, "--eod-token", special.eos)
        self.fingerprint = _sha256(_decisive(config, self._tokenizer.encode_special_tokens))

    def added_tokens(self) -> list[str]:
        """Return the tokens that were added to the vocabulary, such as special ones, in the order of their ids."""
        return [token["content"] for token in self._added()]

    def _added(self) -> list[dict[str, Any]]:
        """The added tokens as tokenizer.json has them."""
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        found = sorted(self._tokenizer.get_added_tokens_decoder().items())
        return [{"id": place, **{flag: getattr(token, flag) for flag in flags}} for place, token in found]

    def encode(self, texts: list[str]) -> Ids:
        """Return the ids of the texts."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return join([np.array(one.ids, dtype=np.uint32) for one in found])

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids, special tokens by name."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class TikTokenizer:
    """Megatron's JSON vocabulary for tiktoken, with its special tokens.

    Source: core/tokenizers/text/libraries/tiktoken_tokenizer.py: the first ids are special tokens, the ranks follow.
    """

    SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    PATTERNS = {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }

    def __init__(self, spec: TokenizerSpec) -> None:
        """Load the vocabulary; raises ValueError if it is not Megatron's JSON or has too few tokens."""
        import base64

        import tiktoken

        model = _existing(spec.model)
        special = [*self.SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(self.SPECIAL), spec.num_special_tokens))]
        wanted = spec.vocab_size - spec.num_special_tokens
        if spec.pattern not in self.PATTERNS:
            raise ValueError(f"--tiktoken-pattern {spec.pattern}: it is v1 or v2.")
        if spec.num_special_tokens < len(self.SPECIAL) or wanted < 256:
            raise ValueError(
                f"--vocab-size {spec.vocab_size} with --tiktoken-num-special-tokens {spec.num_special_tokens}: a "
                "vocabulary has at least 7 special tokens and the 256 bytes; give both as they are in training."
            )
        content = model.read_bytes()
        try:
            entries = [base64.b64decode(entry["token_bytes"]) for entry in json.loads(content)[:wanted]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{model} is not a tiktoken vocabulary of Megatron: a JSON list of objects with rank, token_bytes and "
                "token_str."
            ) from None
        if len(entries) < wanted:
            raise ValueError(
                f"{model} has {len(entries):,} tokens, but --vocab-size {spec.vocab_size} without "
                f"{spec.num_special_tokens} special ones needs {wanted:,}; give --vocab-size "
                f"{len(entries) + spec.num_special_tokens}, here and in training."
            )
        ranks = {entry: rank + spec.num_special_tokens for rank, entry in enumerate(entries)}
        names = {name: i for i, name in enumerate(special)}
        self._model = tiktoken.Encoding(
            model.stem, pat_str=self.PATTERNS[spec.pattern], mergeable_ranks=ranks, special_tokens=names
        )
        self.vocab_size = spec.vocab_size
        self.bos_id, self.eod_id = names["<s>"], names["</s>"]
        settings = f"{spec.pattern} {spec.num_special_tokens} {spec.vocab_size} ".encode()
        self.fingerprint = _sha256(settings + content)

    def encode(self, texts: list[str]) -> Ids:
        """Return the ids of the texts."""
        return join([self._model.encode_to_numpy(text, allowed_special="all") for text in texts])

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids."""
        return self._model.decode(ids)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then BOS 256 and the end of document 257.

    Training reads such data with --tokenizer-type NullTokenizer --vocab-size 258, whose end of document is the last id.
    """

    vocab_size = 258
    bos_id: int | None = 256
    eod_id: int | None = 257

    def __init__(self, spec: TokenizerSpec) -> None:
        """There is nothing to load."""
        self.fingerprint = _sha256(b"bytes, BOS 256, EOD 257")

    def encode(self, texts: list[str]) -> Ids:
        """Return the bytes of the texts."""
        return join([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts])

    def decode(self, ids: list[int]) -> str:
        """Return the text of some bytes; a part of a character shows as such."""
        names = {256: b"<s>", 257: b"</s>"}
        return b"".join(names.get(token) or bytes([token]) for token in ids).decode(errors="replace")


TOKENIZERS: dict[str, Any] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,
    "Llama2Tokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "TikTokenizer": TikTokenizer,
    "ByteTokenizer": ByteTokenizer,
}
"""Tokenizer by the name that Megatron's --tokenizer-type has for it; ByteTokenizer is ours."""


def _existing(model: Path | None) -> Path:
    if model is None or not model.exists():
        raise ValueError(f"tokenizer model {model} does not exist; make one with tools/train_tokenizer.py.")
    return model


def _tokenizer_json(model: Path) -> Path:
    file = model / "tokenizer.json" if model.is_dir() else model
    if not file.is_file():
        raise ValueError(
            f"{model} contains no tokenizer.json: copy tokenizer.json, tokenizer_config.json and, if there are any, "
            "special_tokens_map.json and added_tokens.json from where the tokenizer was published, as they are; "
            "transformers' save_pretrained may write others."
        )
    return file


def _token_id(vocabulary: dict[str, int], asked: str | None, flag: str, named: str | None) -> int | None:
    if asked is not None and asked not in vocabulary:
        raise ValueError(f"{flag} {asked}: the tokenizer has no such token.")
    name = asked or named
    return None if name is None else vocabulary.get(name)


def _decisive(config: dict[str, Any], splits_special_tokens: bool) -> bytes:
    """What decides the ids in a tokenizer.json, however the file is written."""
    parts = {name: config.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    model = dict(parts["model"] or {})
    if "merges" in model:  # written as "a b" or as ["a", "b"]
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    parts |= {"model": model} | ({"split_special_tokens": True} if splits_special_tokens else {})
    return json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()


def _id_or_none(piece: int) -> int | None:
    return piece if piece >= 0 else None


def _sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
