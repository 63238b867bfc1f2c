"""Tokenizers for preprocessing, with the ids that Megatron's tokenizer of the same type gives."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_hybrid.data.files import atomic_write


class Tokenizer(Protocol):
    """What preprocessing asks of a tokenizer."""

    vocab_size: int
    """Number of ids, before Megatron pads it."""
    bos_id: int | None
    """Id that starts a document, if the tokenizer has one."""
    eod_id: int | None
    """Id that ends a document, if the tokenizer has one."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without any that start or end a document."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model; the ids are those of Megatron's SentencePieceTokenizer.

    Source of the end of document (the model's EOS): ``eod`` in upstream's
    core/tokenizers/text/libraries/abstract_tokenizer.py.
    """

    def __init__(self, model: Path) -> None:
        """Load a model; raises ValueError if ``model`` is none, or one that changes the text."""
        if not model.is_file():
            raise ValueError(f"tokenizer model {model} does not exist; make one with tools/train_tokenizer.py.")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model.read_bytes())
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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return self._model.encode(texts, num_threads=1)


def _id_or_none(piece: int) -> int | None:
    return piece if piece >= 0 else None


TOKENIZERS: dict[str, Callable[[Path], Tokenizer]] = {"SentencePieceTokenizer": SentencePieceTokenizer}
"""Tokenizer by the name that Megatron's --tokenizer-type has for it."""


def load_tokenizer(kind: str, model: Path) -> Tokenizer:
    """Load the tokenizer of a type of TOKENIZERS; raises ValueError if it cannot."""
    if kind not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ValueError(f"tokenizer type {kind!r} is not supported; the types are: {known}.")
    return TOKENIZERS[kind](model)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output: Path, sample_bytes: int) -> int:
    """Train a BPE model with byte fallback on the first ``sample_bytes`` of the texts; save it.

    Nothing is normalised and spaces are kept, so text and code are restored exactly from their
    ids; digits stand alone. Ids: 0 unknown, 1 BOS, 2 EOS (Megatron's end of document), 3 padding.
    Returns the bytes that were used. Raises ValueError if the sample has too little text for
    ``vocab_size``, or the vocabulary too little room for the characters.
    """
    lines = _Sample(texts, sample_bytes)
    with atomic_write(output) as stream:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=stream,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                num_threads=1,  # the number is stored in the model, and two gain nothing for BPE
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"a vocabulary of {vocab_size} cannot be trained on {lines.bytes} bytes of text: "
                f"{_reason(error)}. Take another --vocab-size, or more text."
            ) from None
    return lines.bytes


class _Sample:
    """Lines of the texts until ``limit`` bytes are used; ``bytes`` counts them."""

    def __init__(self, texts: Iterable[str], limit: int) -> None:
        self.texts, self.limit, self.bytes = texts, limit, 0

    def __iter__(self):
        for text in self.texts:
            for line in text.splitlines():
                if self.bytes >= self.limit:
                    return
                self.bytes += len(line.encode()) + 1
                if line:
                    yield line


def _reason(error: RuntimeError) -> str:
    """The sentence of a SentencePiece error that is meant for users (it starts at '] ')."""
    return str(error).rpartition("] ")[2].strip().rstrip(".")
