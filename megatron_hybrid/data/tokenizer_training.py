"""Train a tokenizer on a sample of a corpus: SentencePiece, or Hugging Face byte-level BPE.

The sample is drawn from the whole corpus in one pass and bounded memory. The same corpus, settings and
seed give the same tokenizer, byte for byte.
"""

import heapq
import io
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid.files import atomic_write, sync_directory, temporary_path

NORMALIZATIONS = {
    "sentencepiece": ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"),
    "huggingface": ("identity", "nfc", "nfkc"),
}
"""What each library can do to a text before it is encoded; _cf also folds case, nmt_ also makes blanks spaces."""
SENTENCEPIECE_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""Ids 0 to 3; <s> is BOS, </s> is EOS (Megatron's end of document)."""
HUGGINGFACE_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
"""Ids 0 and 1: BOS and EOS."""
_BYTES = 256
_LINE_CHARS = 4096
"""SentencePiece's time for unigram grows with the square of a word's length, and a whole line can be one word."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words, across which BPE never merges: Qwen 2's rule with digits alone, Llama 3's with three. gigatoken knows both."""


class Sample(NamedTuple):
    """Documents to train on, in the order of the corpus."""

    texts: list[bytes]
    """In UTF-8."""
    size: int
    """Their bytes."""
    documents: int
    """Documents of the corpus that are not empty."""
    complete: bool = True
    """Whether the sample is the whole corpus."""


def draw_sample(texts: Iterable[str], limit: int, seed: int) -> Sample:
    """Draw documents until their UTF-8 is ``limit`` bytes; every document of the corpus is equally likely.

    Each document that is not empty draws a random key, in order; those with the smallest keys are the sample. The last
    of these is truncated to fit. A corpus of at most ``limit`` bytes is used completely.
    """
    if limit < 1:
        raise ValueError(f"--sample-bytes {limit}: training needs text; give 1 or more.")
    draw = random.Random(seed).random
    heap: list[tuple[float, int, bytes]] = []  # by the negative key: the largest key comes first
    size = number = 0
    complete = True
    for text in texts:
        if not text:
            continue
        number += 1
        key = -draw()
        if size >= limit and key < heap[0][0]:
            complete = False
            continue
        content = text.encode()[: limit + 1]  # one byte more than fits shows that it is truncated
        heapq.heappush(heap, (key, number, content))
        size += len(content)
        while size - len(heap[0][2]) >= limit:
            size -= len(heapq.heappop(heap)[2])
            complete = False
    if size > limit:
        key, last, content = heapq.heappop(heap)
        content = content[: len(content) - (size - limit)].decode(errors="ignore").encode()
        heapq.heappush(heap, (key, last, content))
        complete = False
    chosen = [content for _, _, content in sorted(heap, key=lambda entry: entry[1]) if content]
    return Sample(chosen, sum(map(len, chosen)), number, complete)


@dataclass(frozen=True)
class Settings:
    """What tokenizer to train."""

    vocab_size: int
    """Number of ids, with those of special tokens."""
    library: str = "sentencepiece"
    """sentencepiece or huggingface."""
    model_type: str = "bpe"
    """bpe, or unigram (SentencePiece only)."""
    byte_fallback: bool | None = None
    """SentencePiece: characters without a piece become bytes (default), else the unknown token."""
    split_digits: bool = True
    """Each digit is a token; else SentencePiece merges digits freely, and Hugging Face's BPE up to three."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that are never split; they follow the library's own, see SENTENCEPIECE_TOKENS and HUGGINGFACE_TOKENS."""
    normalization: str = "identity"
    """One of NORMALIZATIONS; with any but identity the text cannot be restored exactly."""

    def check(self) -> None:
        """Raise ValueError if the library cannot do what is asked."""
        if self.library not in NORMALIZATIONS:
            raise ValueError(f"--library {self.library}: the libraries are {' and '.join(NORMALIZATIONS)}.")
        if self.model_type not in ("bpe", "unigram"):
            raise ValueError(f"--model-type {self.model_type}: the types are bpe and unigram.")
        if self.library == "huggingface":
            if self.model_type != "bpe":
                raise ValueError(
                    f"--model-type {self.model_type} is SentencePiece's: --library huggingface trains byte-level BPE "
                    "only. Give --library sentencepiece, or --model-type bpe."
                )
            if self.byte_fallback is not None:
                raise ValueError(
                    "--byte-fallback and --no-byte-fallback are SentencePiece's: --library huggingface trains "
                    "byte-level BPE, which has all bytes. Leave the flag out."
                )
        known = NORMALIZATIONS[self.library]
        if self.normalization not in known:
            raise ValueError(f"--normalization {self.normalization}: --library {self.library} has {', '.join(known)}.")
        own = self.own_tokens
        for number, token in enumerate(self.special_tokens):
            if not token or token in own or token in self.special_tokens[:number]:
                raise ValueError(
                    f"--special-tokens {token!r}: give each once, none empty, and none of those that are there anyway: "
                    f"{' '.join(own)}."
                )
        least = len(own) + len(self.special_tokens) + (_BYTES if self.has_bytes else 0)
        if self.vocab_size < least + 1:
            raise ValueError(
                f"--vocab-size {self.vocab_size} is too small: special tokens{' and bytes' * self.has_bytes} alone are "
                f"{least}. Give more, such as 32000."
            )

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """The special tokens that the library's tokenizers always have here, from id 0."""
        return HUGGINGFACE_TOKENS if self.library == "huggingface" else SENTENCEPIECE_TOKENS

    @property
    def has_bytes(self) -> bool:
        """Whether all 256 bytes have an id."""
        return self.library == "huggingface" or self.byte_fallback is not False


def check_output(output: Path, library: str, overwrite: bool) -> None:
    """Raise ValueError if a tokenizer cannot be written to ``output``.

    SentencePiece's is a file, Hugging Face's a folder. An existing output is replaced only with ``overwrite``, and
    a folder only if it contains a tokenizer and nothing else.
    """
    folder = library == "huggingface"
    if folder and output.suffix in (".json", ".model"):
        raise ValueError(f"--output {output}: a tokenizer of --library huggingface is a folder; name one.")
    if not output.exists():
        return
    if folder and output.is_dir():
        others = sorted(path.name for path in output.iterdir() if path.name not in _FILES)
        if others:
            raise ValueError(
                f"--output {output} contains other files ({', '.join(others[:3])}), so it is not replaced; name "
                "another."
            )
    elif folder or not output.is_file():
        kind = "folder" if folder else "file"
        raise ValueError(
            f"--output {output} exists and is not a {kind}, which --library {library} writes; name another."
        )
    if not overwrite:
        raise ValueError(f"--output {output} exists; give --overwrite to replace it, or another name.")


def train(settings: Settings, sample: Sample, progress: bool = False) -> dict[str, bytes]:
    """Train a tokenizer; returns its files by name: one for SentencePiece, a folder's for Hugging Face.

    progress: the Hugging Face library shows bars of its own; SentencePiece is quiet. Raises ValueError for a user's
    mistake, or if the sample cannot support the vocabulary.
    """
    settings.check()
    if not any(text.strip() for text in sample.texts):
        raise ValueError("the input has no text to train on: all of its documents are empty, or there are none.")
    if settings.library == "huggingface":
        return _train_huggingface(settings, sample, progress)
    return {"tokenizer.model": _train_sentencepiece(settings, sample)}


def write(files: dict[str, bytes], output: Path, library: str, overwrite: bool = False) -> None:
    """Write what :func:`train` returned: ``output`` appears complete or not at all.

    Raises ValueError as :func:`check_output`, OSError if it cannot be written.
    """
    check_output(output, library, overwrite)  # again: training can take hours
    if library == "huggingface":
        _write_folder(output, files)
        return
    (content,) = files.values()
    with atomic_write(output) as stream:
        stream.write(content)


# --- SentencePiece ---------------------------------------------------------------------------------


def _train_sentencepiece(settings: Settings, sample: Sample) -> bytes:
    """Return a model that keeps spaces as they are, so that text and code are restored exactly from their ids."""
    import sentencepiece

    stream = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample.texts),
            model_writer=stream,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            byte_fallback=settings.has_bytes,
            split_digits=settings.split_digits,
            user_defined_symbols=list(settings.special_tokens),
            normalization_rule_name=settings.normalization,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the number is stored in the model, and decides the last bits of unigram's scores
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_remedy(settings, sample, str(error))) from None
    content = stream.getvalue()
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    for token in settings.special_tokens:
        if model.encode(token) != [model.piece_to_id(token)]:
            raise ValueError(f"--special-tokens {token!r}: SentencePiece splits this token; name another.")
    return content


def _lines(texts: list[bytes]) -> Iterator[str]:
    for text in texts:
        for line in text.decode().splitlines():
            for start in range(0, len(line), _LINE_CHARS):
                yield line[start : start + _LINE_CHARS]


def _remedy(settings: Settings, sample: Sample, error: str) -> str:
    """A SentencePiece error as a helpful message."""
    size = settings.vocab_size
    if found := re.search(r"Vocabulary size too high.* <= (\d+)", error):
        return _too_high(settings, sample, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"--vocab-size {size} is too small: the characters and special tokens of the sample alone are {found[1]}. "
            "Give more, such as 32000."
        )
    reason = error.rpartition("] ")[2].strip().rstrip(".") or error
    return f"a vocabulary of {size} cannot be trained on {sample.size:,} bytes of text: {reason}."


def _too_high(settings: Settings, sample: Sample, most: int) -> str:
    more = "more text" if sample.complete else "more --sample-bytes"
    return (
        f"a vocabulary of {settings.vocab_size} is more than {sample.size:,} bytes of text support: they give {most:,} "
        f"tokens. Give --vocab-size {most} or less, or {more}."
    )


# --- Hugging Face ----------------------------------------------------------------------------------

_FILES = ("tokenizer.json", "tokenizer_config.json")


def _train_huggingface(settings: Settings, sample: Sample, progress: bool) -> dict[str, bytes]:
    """Return the files of a byte-level BPE tokenizer without a space put before the text or tokens around it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    words = _WORDS.format(digits=r"\p{N}" if settings.split_digits else r"\p{N}{1,3}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if settings.normalization != "identity":
        tokenizer.normalizer = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[settings.normalization]()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[*HUGGINGFACE_TOKENS, *settings.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator((text.decode() for text in sample.texts), trainer, length=len(sample.texts))
    if tokenizer.get_vocab_size() < settings.vocab_size:
        raise ValueError(_too_high(settings, sample, tokenizer.get_vocab_size()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": HUGGINGFACE_TOKENS[0],
        "eos_token": HUGGINGFACE_TOKENS[1],
        "clean_up_tokenization_spaces": False,
    }
    contents = tokenizer.to_str(pretty=True), json.dumps(config, indent=2) + "\n"
    return {name: text.encode() for name, text in zip(_FILES, contents, strict=True)}


def _write_folder(output: Path, files: dict[str, bytes]) -> None:
    """Write a folder that appears complete or not at all; an existing one is replaced."""
    temporary = temporary_path(output)
    old = temporary.with_suffix(".old")
    try:
        for name, content in files.items():
            with atomic_write(temporary / name) as stream:
                stream.write(content)
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        sync_directory(output.parent)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
