"""From text to an indexed data set: readers, tokenizer, writer, and all of them together."""

import io
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.files import atomic_write
from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from megatron_hybrid.data.preprocess import Encoding, preprocess
from megatron_hybrid.data.readers import read_chunks, read_texts
from megatron_hybrid.data.stdlib_corpus import documents, documents_of
from megatron_hybrid.data.tokenizers import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def texts():
    """Some documents of real text and code."""
    return documents(LIBRARY / "json") + documents(LIBRARY / "asyncio")


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_sentencepiece(texts, 600, path, sample_bytes=10_000_000)
    return path


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# --- readers ---------------------------------------------------------------------------------------


def test_chunks_cover_the_files_in_order(tmp_path):
    texts = [f"document {i} \u2028 " + "x" * (i % 37) for i in range(300)]
    a, b = write_lines(tmp_path / "a", texts[:200]), write_lines(tmp_path / "b", texts[200:])
    chunks = list(read_chunks([a, b], chunk_bytes=500))
    assert len(chunks) > 20
    assert [len(c.lines) + c.first_line for c in chunks[:-1] if c.path == a][:-1] == [
        c.first_line for c in chunks[1:] if c.path == a
    ]
    assert b"".join(line for c in chunks for line in c.lines) == a.read_bytes() + b.read_bytes()
    assert list(read_texts([a, b], "text")) == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[1]", "is a JSON list, not an object"),
        (b'{"body": "x", "id": 1}', 'no key "text" (the line has: body, id)'),
        (b'{"text": 3}', 'the value of "text" is a int'),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError) as error:
        list(read_texts([path], "text"))
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


# --- writers ---------------------------------------------------------------------------------------


def test_atomic_write_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_same_bytes_as_upstream(tmp_path, vocab_size, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    assert dtype_for(vocab_size) == dtype == DType.optimal_dtype(vocab_size)
    rng = np.random.default_rng(5)
    docs = [rng.integers(0, vocab_size, n) for n in (1, 7, 4096, 2, 333)]
    docs[0][0] = vocab_size - 1
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for doc in docs:
        builder.add_document(torch.tensor(doc), [len(doc)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        for part in (docs[:2], docs[2:]):
            writer.add(np.concatenate(part).astype(dtype), np.array([len(doc) for doc in part]))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [list(read[i]) for i in range(len(read))] == [list(doc) for doc in docs]


def test_failed_write_leaves_what_was_there(tmp_path):
    prefix = tmp_path / "v1.5"
    ids, lengths = np.arange(3, dtype=np.uint16), np.array([3])
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(ids, lengths)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"v1.5.bin", "v1.5.idx"}
    with pytest.raises(ValueError, match="4 tokens in all"), IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(ids, lengths)
        writer.add(ids, np.array([4]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- tokenizer -------------------------------------------------------------------------------------


def test_tokenizer_restores_any_text(model, texts):
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (600, 1, 2)
    odd = "  two  spaces\n\ttab\r\n\n\n    漢字 ünï \U0001f40d 1234 end \n"
    for text in [odd, *texts[:20]]:
        ids = tokenizer.encode([text])[0]
        assert tokenizer._model.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids), "no unknown, BOS, EOS or padding inside a text"


def test_ids_and_specials_are_those_of_megatron(model, texts):
    from megatron.core.tokenizers import MegatronTokenizer

    theirs = MegatronTokenizer.from_pretrained(str(model), metadata_path={"library": "sentencepiece"})
    ours = SentencePieceTokenizer(model)
    assert (theirs.vocab_size, theirs.bos, theirs.eod) == (ours.vocab_size, ours.bos_id, ours.eod_id)
    samples = [*texts[:10], " leading", "trailing ", "a  b"]
    assert ours.encode(samples) == [theirs.tokenize(text) for text in samples]


def test_training_is_deterministic(texts, model, tmp_path):
    again = tmp_path / "again.model"
    train_sentencepiece(texts, 600, again, sample_bytes=10_000_000)
    assert again.read_bytes() == model.read_bytes()


@pytest.mark.parametrize(("vocab_size", "sample"), [(100_000, 10_000_000), (100, 10_000_000), (600, 0)])
def test_vocabulary_that_the_sample_cannot_support(texts, tmp_path, vocab_size, sample):
    output = tmp_path / "tok.model"
    with pytest.raises(ValueError, match=rf"vocabulary of {vocab_size} .*--vocab-size, or more text"):
        train_sentencepiece(texts, vocab_size, output, sample_bytes=sample)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused(tmp_path, texts):
    import sentencepiece

    not_a_model = tmp_path / "text.model"
    not_a_model.write_text("hello")
    collapsing = io.BytesIO()  # sentencepiece's defaults drop repeated spaces
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts).splitlines()), model_writer=collapsing, vocab_size=300, minloglevel=2
    )
    (tmp_path / "collapsing.model").write_bytes(collapsing.getvalue())
    for name, message in [
        ("absent.model", "does not exist"),
        ("text.model", "not a SentencePiece model"),
        ("collapsing.model", "drops repeated spaces"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer("SentencePieceTokenizer", tmp_path / name)
    with pytest.raises(ValueError, match="'BertTokenizer' is not supported; the types are: SentencePieceTokenizer"):
        load_tokenizer("BertTokenizer", not_a_model)


# --- all together ----------------------------------------------------------------------------------


def read_documents(prefix):
    """The documents of an indexed data set, from the file format alone."""
    idx = prefix.with_name(prefix.name + ".idx").read_bytes()
    count = int(np.frombuffer(idx, np.int64, 1, 18)[0])
    lengths = np.frombuffer(idx, np.int32, count, 34)
    ids = np.fromfile(prefix.with_name(prefix.name + ".bin"), np.uint16)
    return [list(part) for part in np.split(ids, np.cumsum(lengths))[:-1]]


def test_preprocess_marks_documents(model, tmp_path):
    lines = write_lines(tmp_path / "corpus.jsonl", ["first text", "", "second"])
    tokenizer = SentencePieceTokenizer(model)
    first, second = tokenizer.encode(["first text", "second"])
    for bos, eod in [(False, False), (True, False), (False, True), (True, True)]:
        encoding = Encoding("SentencePieceTokenizer", model, "text", bos, eod)
        totals = preprocess([lines], tmp_path / "out", encoding)
        expected = [[1] * bos + ids + [2] * eod for ids in (first, second)]
        assert read_documents(tmp_path / "out") == expected
        assert totals == (2, sum(map(len, expected)), 1, lines.stat().st_size)


def test_workers_do_not_change_the_files(model, texts, tmp_path):
    rng = random.Random(3)
    many = [text[:-1] + str(rng.random()) for text in texts for _ in range(8)]
    lines = write_lines(tmp_path / "corpus.jsonl", many)
    assert lines.stat().st_size > 3 << 20, "several chunks"
    encoding = Encoding("SentencePieceTokenizer", model, append_eod=True)
    seen = []
    totals = [
        preprocess([lines], tmp_path / f"out{workers}", encoding, workers, lambda e: seen.append(e.read_bytes))
        for workers in (1, 2)
    ]
    assert totals[0] == totals[1] and totals[0].documents == len(many)
    assert sum(seen) == 2 * lines.stat().st_size and len(seen) >= 8
    for ending in ("bin", "idx"):
        assert (tmp_path / f"out1.{ending}").read_bytes() == (tmp_path / f"out2.{ending}").read_bytes()


def test_a_bad_line_in_a_worker_is_named_and_nothing_is_written(model, tmp_path):
    lines = write_lines(tmp_path / "corpus.jsonl", ["good"] * 10)
    with lines.open("a") as stream:
        stream.write("bad\n")
    with pytest.raises(ValueError, match=r"corpus.jsonl:11: not valid JSON"):
        preprocess([lines], tmp_path / "out", Encoding("SentencePieceTokenizer", model), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(("lines", "workers", "message"), [(["", ""], 1, "no document"), (["x"], 0, "workers 0")])
def test_preprocess_refuses(model, tmp_path, lines, workers, message):
    path = write_lines(tmp_path / "corpus.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        preprocess([path], tmp_path / "out", Encoding("SentencePieceTokenizer", model), workers)


# --- corpus ----------------------------------------------------------------------------------------

MODULE = '''"""Module docstring, {0}."""
import os

class Thing:
    """Class docstring."""

    def empty(self):
        """Only a docstring,
            on two lines."""

    def one(self): "inline docstring"; return 1

    async def go(self):
        """Async docstring."""
        return "not a docstring {0}"
'''


def test_docstrings_are_in_the_prose_and_not_in_the_code(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE.format("x"))
    code, prose = documents_of(path)
    assert prose.startswith("Module docstring, x.\n\nThing: Class docstring.\n\nempty: Only a docstring,\n")
    assert "go: Async docstring." in prose and "not a docstring" not in prose
    for text in ("Module docstring", "Class docstring", "Only a docstring", "Async docstring"):
        assert text not in code
    assert 'return "not a docstring x"' in code
    namespace: dict = {}
    exec(compile(code, "module", "exec"), namespace)  # what is left is still a program
    assert namespace["Thing"]().one() == 1 and namespace["Thing"]().empty() is None


def test_corpus_is_chosen_deduplicated_and_ordered(tmp_path):
    body = "x = 'a line of code that is long enough'\n" * 10
    for name, number in [("b.py", 1), ("a.py", 2), ("copy.py", 1), ("sub/c.py", 3), ("test/t.py", 4)]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"n = {number}\n{body}")
    (tmp_path / "short.py").write_text("n = 5\n")
    (tmp_path / "latin.py").write_bytes(b"n = 6 # \xe9\n" + body.encode())
    (tmp_path / "broken.py").write_text(f"n = = 7\n{body}")
    (tmp_path / "topics.py").write_text(f"topics = {{'one': {'help ' * 60!r}, 'two': {'HELP ' * 60!r}}}\n")
    found = documents(tmp_path)
    assert sorted(text.splitlines()[0][:5] for text in found) == ["HELP ", "help ", "n = 1", "n = 2", "n = 3"]
    (tmp_path / "a.py").rename(tmp_path / "z.py")
    assert documents(tmp_path) == found, "the order comes from the texts, not from the names"


def test_corpus_without_sources(tmp_path):
    with pytest.raises(ValueError, match="holds no Python sources"):
        documents(tmp_path)
