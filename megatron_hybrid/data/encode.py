"""From batches to documents of token ids: parse, filter, tokenize, mark; on threads, in order."""

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megatron_hybrid.data import dedup
from megatron_hybrid.data.documents import Fault, parse
from megatron_hybrid.data.filters import Filters
from megatron_hybrid.data.gigatokens import GigatokenTokenizer, first_difference, hard_texts, unsuitable, version
from megatron_hybrid.data.ids import range_of
from megatron_hybrid.data.indexed import dtype_for
from megatron_hybrid.data.sources import Batch
from megatron_hybrid.data.tokenizers import HuggingFaceTokenizer, Ids, Tokenizer, TokenizerSpec, load_tokenizer, split

ENGINES = ("auto", "gigatoken", "tokenizers")
IN_FLIGHT_BYTES = 32 << 20
"""Text that waits or is worked on, for each worker; a longer document goes alone."""


@dataclass(frozen=True)
class Encoding:
    """How a document becomes ids."""

    tokenizer: TokenizerSpec
    keys: tuple[str, ...] = ("text",)
    text_split: str = "file"
    prepend_bos: bool = False
    append_eod: bool = False
    filters: Filters = Filters()
    skip_faults: bool = False
    """Skip bad records and list them in a report, rather than stop at the first."""
    digests: bool = False
    """Whether each document's digest is wanted, for de-duplication."""
    engine: str = "auto"
    verify_tokens: bool = False
    memory_limit: int = 1 << 30
    """Bytes that gigatoken's caches may take, in all threads."""


@dataclass
class Documents:
    """The documents of one batch under one key."""

    ids: np.ndarray
    """Ids of all documents, one after the other, ``[tokens]``, of the data set's dtype."""
    lengths: np.ndarray
    """Tokens of each document, ``[documents]``."""
    digests: bytes = b""
    text_bytes: int = 0
    """UTF-8 bytes of the documents' texts."""
    empty: int = 0
    """Documents without text or tokens; they are dropped."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Documents that a filter dropped, by its name."""


@dataclass
class Encoded:
    """The result of one batch."""

    batch: Batch
    documents: list[Documents]
    """One for each key."""
    faults: list[Fault]
    corrected: int = 0
    """Texts whose ids --verify-tokens had to take from the slower library."""


class Encoder:
    """Encodes batches on one thread at a time."""

    def __init__(self, encoding: Encoding, tokenizer: Tokenizer, reference: Tokenizer | None = None) -> None:
        """``reference`` checks the tokenizer's ids; see verify_tokens.

        Raises ValueError if the tokenizer lacks an id that is asked for.
        """
        self.encoding, self.tokenizer, self.reference = encoding, tokenizer, reference
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.head = special(tokenizer.bos_id, "BOS", "--prepend-bos", "--bos-token", encoding.prepend_bos)
        self.tail = special(tokenizer.eod_id, "EOS", "--append-eod", "--eod-token", encoding.append_eod)

    def encode(self, batch: Batch) -> Encoded:
        """Return the documents and faults of a batch."""
        texts, faults = parse(batch, list(self.encoding.keys), self.encoding.text_split, not self.encoding.skip_faults)
        encoded = Encoded(batch, [], faults)
        for column in texts:
            encoded.documents.append(self._documents(column, encoded))
        encoded.batch = batch._replace(content=None)  # the text is not needed any more
        return encoded

    def _documents(self, texts: list[str], encoded: Encoded) -> Documents:
        filled = [text for text in texts if text]
        filtered: dict[str, int] = {}
        if self.encoding.filters:
            passed = []
            for text in filled:
                rule = self.encoding.filters.broken(text)
                if rule:
                    filtered[rule] = filtered.get(rule, 0) + 1
                else:
                    passed.append(text)
            filled = passed
        ids, lengths = self._ids(filled, encoded)
        found = range_of(ids)
        if found and (fault := found.fault(self.tokenizer.vocab_size)):
            raise ValueError(f"the tokenizer gave {fault}; nothing is written for them. Is its file corrupt?")
        texts_without = int((lengths == 0).sum())
        ids, lengths = mark(ids, lengths[lengths > 0], self.head, self.tail, self.dtype)
        documents = Documents(ids, lengths, filtered=filtered)
        documents.text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in filled)
        documents.empty = len(texts) - sum(filtered.values()) - len(filled) + texts_without
        if self.encoding.digests:
            documents.digests = dedup.digests(ids, lengths)
        return documents

    def _ids(self, texts: list[str], encoded: Encoded) -> Ids:
        found = self.tokenizer.encode(texts)
        if self.reference is None:
            return found
        wanted = self.reference.encode(texts)
        if np.array_equal(wanted.lengths, found.lengths) and np.array_equal(wanted.ids, found.ids):
            return found
        pairs = zip(split(wanted), split(found), strict=True)
        encoded.corrected += sum(not np.array_equal(a, b) for a, b in pairs)
        return wanted


def special(token: int | None, name: str, flag: str, by_name: str, wanted: bool) -> list[int]:
    """Return the id that marks a document, if it is wanted; raises ValueError if the tokenizer has none."""
    if not wanted:
        return []
    if token is None:
        raise ValueError(
            f"{flag}: the tokenizer defines no {name} token; leave the flag out, or (Hugging Face) give {by_name}."
        )
    return [token]


def mark(ids: np.ndarray, lengths: np.ndarray, head: list[int], tail: list[int], dtype: np.dtype) -> Ids:
    """Put ``head`` before each document and ``tail`` after it; ids ``[tokens]``, lengths ``[documents]`` above 0."""
    if not head and not tail:
        return Ids(ids.astype(dtype), lengths)
    marked = lengths + len(head) + len(tail)
    ends = np.cumsum(marked)
    result = np.empty(int(marked.sum()), dtype=dtype)
    inside = np.ones(result.size, dtype=bool)
    if head:
        inside[ends - marked] = False
        result[ends - marked] = head[0]
    if tail:
        inside[ends - 1] = False
        result[ends - 1] = tail[0]
    result[inside] = ids
    return Ids(result, marked)


# --- which tokenizer, on how many threads ------------------------------------------------------------


def make_encoders(encoding: Encoding, workers: int, sample: list[str]) -> tuple[list[Encoder], str]:
    """Return an encoder for each worker, and a line that says what encodes.

    sample: texts of the corpus, on which gigatoken's ids are checked before it is used. Raises ValueError if an engine
    is asked for that gives other ids or cannot be used.
    """
    tokenizer = load_tokenizer(encoding.tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        if encoding.engine == "gigatoken":
            raise ValueError("--tokenizer-engine gigatoken: it is for Hugging Face byte-level BPE only; use auto.")
        return _encoders(encoding, tokenizer, workers), encoding.tokenizer.kind
    fast, reason = _gigatoken(encoding, tokenizer, sample)
    note = _builder_note(tokenizer)
    if fast is None:
        return _encoders(encoding, tokenizer, workers), f"Hugging Face tokenizers{reason}{note}"
    all_fast = [fast, *(GigatokenTokenizer(tokenizer, encoding.memory_limit) for _ in range(workers - 1))]
    references = [load_tokenizer(encoding.tokenizer) if encoding.verify_tokens else None for _ in range(workers)]
    encoders = [Encoder(encoding, one, reference) for one, reference in zip(all_fast, references, strict=True)]
    checked = "every document" if encoding.verify_tokens else f"{len(sample):,} documents and hard cases"
    return encoders, f"gigatoken {version()}, ids compared with Hugging Face tokenizers on {checked}{note}"


def _builder_note(tokenizer: HuggingFaceTokenizer) -> str:
    """What a user should know of a tokenizer whose class transformers may rebuild; empty for others."""
    if not tokenizer.builder:
        return ""
    return (
        f"\nthe ids are those of tokenizer.json; transformers may build the class that its folder names, "
        f"{tokenizer.builder}, with other ids: training compares both and refuses differences"
    )


def _encoders(encoding: Encoding, tokenizer: Tokenizer, workers: int) -> list[Encoder]:
    others = [load_tokenizer(encoding.tokenizer) for _ in range(workers - 1)]
    return [Encoder(encoding, one) for one in (tokenizer, *others)]


def _gigatoken(
    encoding: Encoding, reference: HuggingFaceTokenizer, sample: list[str]
) -> tuple[GigatokenTokenizer | None, str]:
    """The fast engine if it is wanted and gives the same ids; else None, and why not."""
    if encoding.engine == "tokenizers":
        return None, ""
    try:
        if reason := unsuitable(reference):
            raise ValueError(reason)
        fast = GigatokenTokenizer(reference, encoding.memory_limit)
        text = first_difference(reference, fast, hard_texts(reference.added_tokens()) + sample)
        if text is None:
            return fast, ""
        reason = f"gigatoken's ids differ at {text[:60]!r}"
    except ValueError as error:
        reason = str(error)
    if encoding.engine == "gigatoken":
        raise ValueError(f"--tokenizer-engine gigatoken: {reason}. Use --tokenizer-engine tokenizers.")
    return None, f" ({reason})"


def in_order(batches: Iterator[Batch], encoders: list[Encoder]) -> Iterator[Encoded]:
    """Yield the results of the batches, in their order, worked on by as many threads as there are encoders.

    A batch that takes long holds up the order but not the other threads, until IN_FLIGHT_BYTES for each of them wait.
    """
    free: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
    for encoder in encoders:
        free.put(encoder)

    def work(batch: Batch) -> Encoded:
        encoder = free.get()
        try:
            return encoder.encode(batch)
        finally:
            free.put(encoder)

    pending: deque[tuple[Future[Encoded], int]] = deque()
    waiting, most = 0, IN_FLIGHT_BYTES * len(encoders)
    with ThreadPoolExecutor(len(encoders)) as pool:
        try:
            for batch in batches:
                pending.append((pool.submit(work, batch), batch.size))
                waiting += batch.size
                while pending and (waiting > most or pending[0][0].done()):
                    future, size = pending.popleft()
                    waiting -= size
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()
