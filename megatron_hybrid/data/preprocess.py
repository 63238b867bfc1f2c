"""JSON lines to token ids, in order, on several processes."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from megatron_hybrid.data.readers import Chunk, read_chunks, texts_of
from megatron_hybrid.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Encoding:
    """How a document becomes ids."""

    tokenizer_type: str
    tokenizer_model: Path
    json_key: str = "text"
    prepend_bos: bool = False
    append_eod: bool = False


class Encoded(NamedTuple):
    """The documents of one chunk."""

    ids: np.ndarray
    """Ids of all documents, one after the other, ``[tokens]``, of the data set's dtype."""
    lengths: np.ndarray
    """Tokens of each document, ``[documents]``."""
    empty: int
    """Documents without text; they are left out."""
    read_bytes: int
    """Bytes of JSON lines that the chunk had."""


class Totals(NamedTuple):
    """What a whole corpus came to."""

    documents: int
    tokens: int
    empty: int
    read_bytes: int


class Encoder:
    """Encodes chunks; each process builds its own, since a tokenizer does not travel."""

    def __init__(self, encoding: Encoding) -> None:
        """Load the tokenizer; raises ValueError if it lacks an id that is asked for."""
        self.encoding = encoding
        self.tokenizer: Tokenizer = load_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model)
        self.dtype = dtype_for(self.tokenizer.vocab_size)
        self.head = _special(self.tokenizer.bos_id, "BOS", "--prepend-bos", encoding.prepend_bos)
        self.tail = _special(self.tokenizer.eod_id, "EOS", "--append-eod", encoding.append_eod)

    def encode(self, chunk: Chunk) -> Encoded:
        """Encode the documents of a chunk; raises ValueError for a malformed line."""
        texts = texts_of(chunk, self.encoding.json_key)
        filled = [text for text in texts if text]
        documents = [self.head + ids + self.tail for ids in self.tokenizer.encode(filled)]
        lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
        ids = np.fromiter((token for ids in documents for token in ids), dtype=self.dtype, count=lengths.sum())
        empty = len(texts) - len(filled)
        return Encoded(ids, lengths, empty, sum(len(line) for line in chunk.lines))


def _special(token: int | None, name: str, flag: str, wanted: bool) -> list[int]:
    if not wanted:
        return []
    if token is None:
        raise ValueError(f"{flag}: the tokenizer has no {name} token; leave the flag out.")
    return [token]


def preprocess(
    inputs: list[Path],
    prefix: Path,
    encoding: Encoding,
    workers: int = 1,
    progress: Callable[[Encoded], None] = lambda encoded: None,
) -> Totals:
    """Write the documents of JSON-lines files as the indexed data set PREFIX.bin and PREFIX.idx.

    The files do not depend on ``workers``. ``progress`` is called after each chunk. Raises
    ValueError for a user's mistake (a missing file, a malformed line, no document at all); then
    nothing is written.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: at least one process has to work.")
    encoder = Encoder(encoding)  # here as well as in the workers: its errors come before they start
    documents = tokens = empty = read_bytes = 0
    with IndexedWriter(prefix, encoder.dtype) as writer:
        for encoded in encode_chunks(read_chunks(inputs), encoder, workers):
            writer.add(encoded.ids, encoded.lengths)
            documents += len(encoded.lengths)
            tokens += len(encoded.ids)
            empty += encoded.empty
            read_bytes += encoded.read_bytes
            progress(encoded)
        if not documents:
            names = ", ".join(str(path) for path in inputs)
            raise ValueError(f"no document with text in {names}; there is nothing to train on.")
    return Totals(documents, tokens, empty, read_bytes)


def encode_chunks(chunks: Iterable[Chunk], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """Yield the encoded chunks in their order; at most two per worker are in memory at a time."""
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    # Spawned, not forked: the executor has threads, and a fork may copy a lock that one holds.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(encoder.encoding,)
    ) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


_encoder: Encoder | None = None


def _start_worker(encoding: Encoding) -> None:
    global _encoder
    _encoder = Encoder(encoding)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(chunk)
