"""Tokenizer training: the sample, what is trained, how it loads, and what is refused."""

import functools
import json
import os
import random
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data import gigatokens
from megatron_hybrid.data.stdlib_corpus import documents
from megatron_hybrid.data.tokenizer_training import (
    HUGGINGFACE_TOKENS,
    Sample,
    Settings,
    check_output,
    draw_sample,
    train,
    write,
)
from megatron_hybrid.data.tokenizers import TokenizerSpec, load_tokenizer
from tests.support import processes

from .corpora import lines
from .corpora import write as write_corpus

tool = functools.partial(processes.tool, "train_tokenizer")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SPECIAL = ("<|im_start|>", "<|im_end|>")
TEXT = "def f(x):\n\treturn  x * 1234.5  # naïve “quotes” 中文 🙂\r\n\n\n    pass"


@pytest.fixture(scope="module")
def texts():
    """Some documents of real text and code."""
    return documents(LIBRARY / "json") + documents(LIBRARY / "asyncio")


@pytest.fixture(scope="module")
def sample(texts):
    return draw_sample(texts, 100_000, seed=0)


@pytest.fixture(scope="module")
def huggingface(sample, tmp_path_factory):
    """A Hugging Face tokenizer of 1,000 ids."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    settings = Settings(1000, "huggingface", special_tokens=SPECIAL)
    write(train(settings, sample), folder, "huggingface")
    return load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", folder))


@pytest.fixture(scope="module")
def load(sample, tmp_path_factory):
    """Train a SentencePiece model and load it."""

    def make(**settings):
        path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
        write(train(Settings(**{"vocab_size": 600} | settings), sample), path, "sentencepiece")
        return load_tokenizer(TokenizerSpec("SentencePieceTokenizer", path))

    return make


def pieces(tokenizer, text):
    """The text of each id, one by one."""
    return [tokenizer.decode([token]) for token in tokenizer.encode([text]).ids.tolist()]


# --- the sample ------------------------------------------------------------------------------------


def plain_sample(texts, limit, seed):
    """The definition, with the whole corpus in memory."""
    draw = random.Random(seed)
    filled = [text for text in texts if text]
    keyed = sorted((draw.random(), number, text) for number, text in enumerate(filled))
    left, chosen = limit, []
    for _, number, text in keyed:
        content = text.encode()[:left].decode(errors="ignore").encode()
        left -= len(text.encode())
        chosen.append((number, content))
        if left <= 0:
            break
    return [content for _, content in sorted(chosen) if content]


@pytest.mark.parametrize("limit", [1, 2, 50, 51, 52, 53, 1000, 4000, 100_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sample_is_what_the_definition_says(limit, seed):
    rng = random.Random(99)
    texts = ["né中🙂"[rng.randrange(4)] * rng.choice([0, 1, 5, 20, 300]) for _ in range(200)]
    sample = draw_sample(iter(texts), limit, seed)
    assert sample.texts == plain_sample(texts, limit, seed)
    assert sample.size == sum(map(len, sample.texts)) <= limit
    assert sample.documents == sum(map(bool, texts))
    assert sample.complete == (limit >= sum(len(text.encode()) for text in texts))


def test_a_corpus_that_fits_is_used_whole_and_one_that_does_not_fills_the_sample(texts):
    total = sum(len(text.encode()) for text in texts)
    assert draw_sample(texts, total, 5) == Sample([t.encode() for t in texts if t], total, len(texts), True)
    part = draw_sample(texts, total // 3, 5)
    # At most one character is lost where the last document is cut.
    assert total // 3 - 3 <= part.size <= total // 3
    assert part != draw_sample(texts, total // 3, 6), "the seed decides"


def test_every_document_is_equally_likely():
    counts = np.zeros(100)
    for seed in range(400):
        for text in draw_sample((f"{i:02}" for i in range(100)), 40, seed).texts:
            counts[int(text)] += 1
    # 20 of 100 documents, 400 times: 80 each, with a standard deviation of 8. Six of them.
    assert counts.sum() == 8000 and abs(counts - 80).max() < 48
    # Early and late documents alike: the mean of 50 such counts deviates by about 1.
    assert abs(counts[:50].mean() - 80) < 5


def test_the_sample_holds_no_more_than_it_has_to():
    tracemalloc.start()
    try:
        sample = draw_sample(("x" * 1_000_000 for _ in range(50)), 3_000_000, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sample.size == 3_000_000 and sample.documents == 50
    # 50 MB went by; the sample is 3 MB, and a new document is there twice, as text and as bytes.
    assert peak < 6_000_000


# --- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_restores_text_and_has_its_ids(load, model_type):
    tokenizer = load(model_type=model_type, special_tokens=SPECIAL)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (600, 1, 2)
    assert tokenizer.decode(tokenizer.encode([TEXT]).ids.tolist()) == TEXT
    assert {"1", "2", "3", "4"} <= set(pieces(tokenizer, "x = 1234"))
    assert tokenizer.encode(["".join(SPECIAL)]).ids.tolist() == [4, 5]


def test_sentencepiece_settings_reach_the_library(load, sample):
    assert 0 in load(byte_fallback=False).encode(["中"]).ids and 0 not in load().encode(["中"]).ids
    assert pieces(load(normalization="nfkc_cf"), "ﬁRST") == pieces(load(), "first")
    numbers = " ".join(f"{i} 2024 1999" for i in range(2000)).encode()

    def longest_number(split):
        model = trained(Settings(500, split_digits=split), sample, numbers)
        return max(len(piece) for i in range(500) if (piece := model.id_to_piece(i).strip("▁")).isdigit())

    assert longest_number(True) == 1 and longest_number(False) >= 4


def trained(settings, sample, text):
    """SentencePiece's own object for a model of the sample and one text more."""
    import sentencepiece

    sample = Sample([*sample.texts, text], sample.size + len(text), sample.documents + 1)
    return sentencepiece.SentencePieceProcessor(model_proto=train(settings, sample)["tokenizer.model"])


def test_a_long_line_is_learnt_from(sample):
    """SentencePiece passes over lines of more than max_sentence_length bytes without a word."""
    assert "▁qzxqzx" in trained(Settings(500), sample, b" qzxqzx" * 200_000).encode(" qzxqzx", out_type=str)


def test_unigram_does_not_stall_on_a_long_word(sample):
    """Its time grows with the square of a word's length: minutes for this one, if it is not cut."""
    assert trained(Settings(500, model_type="unigram"), sample, b"ab" * 100_000).get_piece_size() == 500


def test_huggingface_restores_text_and_has_its_ids(huggingface):
    assert (huggingface.vocab_size, huggingface.bos_id, huggingface.eod_id) == (1000, 0, 1)
    assert huggingface.added_tokens() == [*HUGGINGFACE_TOKENS, *SPECIAL]
    for text in (TEXT, " leading", "", "\x01\ufeff\U0010ffff"):
        assert huggingface.decode(huggingface.encode([text]).ids.tolist()) == text
    assert pieces(huggingface, "x1234")[-4:] == ["1", "2", "3", "4"]
    assert huggingface.encode(["a" + "".join(SPECIAL)]).ids.tolist()[1:] == [2, 3]
    assert set(huggingface.encode(["".join(map(chr, range(1, 2000)))]).ids) != set(), "no character is unknown"


def test_huggingface_settings_reach_the_library(sample, tmp_path):
    numbers = " ".join(f"{i % 90} 2024 1999" for i in range(2000)).encode()
    settings = Settings(290, "huggingface", split_digits=False, normalization="nfkc")
    write(train(settings, Sample([*sample.texts[:2], numbers], 1, 3)), tmp_path / "tok", "huggingface")
    tokenizer = load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path / "tok"))
    assert pieces(tokenizer, "2024") == ["202", "4"], "groups of up to three"
    assert tokenizer.encode(["ﬁ"]).ids.tolist() == tokenizer.encode(["fi"]).ids.tolist()


def test_megatron_gives_the_same_ids(huggingface, texts):
    from megatron.core.tokenizers import MegatronTokenizer

    folder = str(huggingface.file.parent)
    for special in (False, True):  # there is no post-processor that would add any
        upstream = MegatronTokenizer.from_pretrained(
            folder, metadata_path={"library": "huggingface"}, include_special_tokens=special
        )
        assert (upstream.vocab_size, upstream.bos, upstream.eod) == (1000, 0, 1)
        hard = gigatokens.hard_texts(huggingface.added_tokens())
        for text in [TEXT, *texts[:20], *hard[::7]]:
            assert upstream.tokenize(text) == huggingface.encode([text]).ids.tolist(), text


@pytest.mark.parametrize("flags", [{}, {"split_digits": False}, {"normalization": "nfc"}])
def test_gigatoken_takes_it(sample, texts, tmp_path, flags):
    write(train(Settings(1000, "huggingface", special_tokens=SPECIAL, **flags), sample), tmp_path / "t", "huggingface")
    tokenizer = load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path / "t"))
    fast = gigatokens.GigatokenTokenizer(tokenizer)
    hard = gigatokens.hard_texts(tokenizer.added_tokens())
    assert gigatokens.first_difference(tokenizer, fast, texts + hard) is None


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"library": "huggingface", "model_type": "unigram"}, "unigram is SentencePiece's"),
        ({"library": "huggingface", "byte_fallback": False}, "Leave the flag out"),
        ({"library": "huggingface", "normalization": "nmt_nfkc"}, "huggingface has identity, nfc, nfkc"),
        ({"normalization": "nfc"}, "sentencepiece has identity, nfkc"),
        ({"library": "tiktoken"}, "libraries are sentencepiece and huggingface"),
        ({"model_type": "word"}, "types are bpe and unigram"),
        ({"special_tokens": ("<s>",)}, "there anyway"),
        ({"special_tokens": ("a", "b", "a")}, "each once"),
        ({"special_tokens": ("",)}, "none empty"),
        ({"vocab_size": 260}, "special tokens and bytes alone are 260"),
        ({"vocab_size": 260, "library": "huggingface", "special_tokens": SPECIAL}, "bytes alone are 260"),
        ({"vocab_size": 4, "byte_fallback": False}, "special tokens alone are 4"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"vocab_size": 1000} | settings).check()


@pytest.mark.parametrize("flags", [{}, {"model_type": "unigram"}, {"library": "huggingface"}])
def test_a_vocabulary_that_the_sample_cannot_support(flags):
    text = ("little text to learn from, " * 3).encode()
    with pytest.raises(ValueError, match="--vocab-size [0-9]+ or less, or more --sample-bytes"):
        train(Settings(9999, **flags), Sample([text], len(text), 2, complete=False))
    sample = Sample([text], len(text), 1)
    with pytest.raises(ValueError, match="--vocab-size [0-9]+ or less, or more text") as error:
        train(Settings(9999, **flags), sample)
    most = int(str(error.value).rpartition("--vocab-size ")[2].split()[0])
    assert train(Settings(most, **flags), sample), "the remedy works"


def test_a_vocabulary_without_room_for_the_characters(sample):
    with pytest.raises(ValueError, match="characters and special tokens of the sample alone are 3[0-9][0-9]"):
        train(Settings(280), sample)


@pytest.mark.parametrize("library", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("texts", [[], ["", ""], ["\n", " \n"]])
def test_no_text(library, texts):
    with pytest.raises(ValueError, match="no text to train on"):
        train(Settings(300, library), draw_sample(texts, 100, 0))


def test_a_special_token_that_does_not_stay_whole(sample):
    with pytest.raises(ValueError, match="splits this token"):
        train(Settings(600, special_tokens=(" ",)), sample)


# --- the output ------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_when_asked(tmp_path):
    file, folder = tmp_path / "tok.model", tmp_path / "tok"
    new = {"tokenizer.json": b"new", "tokenizer_config.json": b"new"}
    write({"tokenizer.model": b"old"}, file, "sentencepiece")
    write(dict.fromkeys(new, b"old"), folder, "huggingface")
    for output, library in ((file, "sentencepiece"), (folder, "huggingface")):
        with pytest.raises(ValueError, match="exists; give --overwrite"):
            write(new, output, library)
    assert file.read_bytes() == (folder / "tokenizer.json").read_bytes() == b"old"
    write({"tokenizer.model": b"new"}, file, "sentencepiece", overwrite=True)
    write(new, folder, "huggingface", overwrite=True)
    assert file.read_bytes() == b"new" and {p.name: p.read_bytes() for p in folder.iterdir()} == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok", "tok.model"], "nothing else is left"


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="contains other files .thesis.tex"):
        check_output(tmp_path, "huggingface", overwrite=True)
    with pytest.raises(ValueError, match="is not a file"):
        check_output(tmp_path, "sentencepiece", overwrite=True)
    with pytest.raises(ValueError, match="is not a folder"):
        check_output(tmp_path / "thesis.tex", "huggingface", overwrite=True)
    with pytest.raises(ValueError, match="is a folder; name one"):
        check_output(tmp_path / "tok.model", "huggingface", overwrite=False)


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path):
    old = {"tokenizer.json": b"old", "tokenizer_config.json": b"old"}
    write(old, tmp_path / "tok", "huggingface")
    broken = {"tokenizer.json": b"new", "tokenizer_config.json": None}
    with pytest.raises(TypeError):
        write(broken, tmp_path / "tok", "huggingface", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "tok").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]


# --- the tool --------------------------------------------------------------------------------------


def test_the_same_from_every_kind_of_input_and_every_time(texts, tmp_path):
    half = len(texts) // 2
    write_corpus(tmp_path / "a" / "0.jsonl.gz", texts[:half])
    write_corpus(tmp_path / "a" / "1.parquet", texts[half:])
    whole = write_corpus(tmp_path / "whole.jsonl.zst", texts)
    flags = ["--vocab-size", 500, "--sample-bytes", 100_000, "--special-tokens", *SPECIAL]
    runs = {
        "folder": (["--input", tmp_path / "a"], None),
        "file": (["--input", whole], None),
        "stdin": (["--input", "-"], lines(texts)),
    }
    for name, (arguments, stdin) in runs.items():
        done = tool(*arguments, *flags, "--output", tmp_path / f"{name}.model", input=stdin, text=False)
        assert done.returncode == 0 and done.stderr == b"", done.stderr
    contents = {(tmp_path / f"{name}.model").read_bytes() for name in runs}
    assert len(contents) == 1
    last = done.stdout.decode().splitlines()[-1]
    assert "stdin.model: 500 ids" in last and f"of {len(texts)} documents" in last
    assert f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {tmp_path}/stdin.model" in last
    done = tool("--input", whole, *flags, "--seed", 1, "--output", tmp_path / "seed.model")
    assert done.returncode == 0 and (tmp_path / "seed.model").read_bytes() not in contents


def test_huggingface_is_the_same_on_any_number_of_threads(texts, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    found = []
    for threads in ("1", "3"):
        words = ["--input", corpus, "--vocab-size", 900, "--library", "huggingface", "--output", tmp_path / threads]
        done = tool(*words, env=os.environ | {"RAYON_NUM_THREADS": threads})
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "--tokenizer-type HuggingFaceTokenizer" in done.stdout.splitlines()[-1]
        found.append({path.name: path.read_bytes() for path in (tmp_path / threads).iterdir()})
    assert found[0] == found[1] and set(found[0]) == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input {tmp}/none", "none does not exist"),
        ("--input {tmp}/bad.jsonl", "bad.jsonl:2: not valid JSON"),
        ("--input {tmp}/good.jsonl --text-key a b", "the texts of one key"),
        ("--input {tmp}/good.jsonl --text-key body", 'good.jsonl:1: no key "body"'),
        ("--input {tmp}/good.jsonl", "Give --vocab-size"),
        ("--input {tmp}/good.jsonl --library huggingface", "Give --vocab-size"),
        ("--input {tmp}/good.jsonl --sample-bytes 0", "--sample-bytes 0"),
        ("--input {tmp}/good.jsonl --library huggingface --model-type unigram", "unigram is SentencePiece's"),
    ],
)
def test_mistakes_are_one_paragraph_and_leave_nothing(tmp_path, flags, message):
    (tmp_path / "good.jsonl").write_text('{"text": "little text"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "little text"}\n{"text": \n')
    done = tool(*flags.format(tmp=tmp_path).split(), "--vocab-size", 9999, "--output", tmp_path / "out")
    error = done.stderr
    assert done.returncode == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]


def test_an_existing_output_is_refused_before_the_work(tmp_path):
    (tmp_path / "tok.model").write_text("dear")
    done = tool("--input", tmp_path / "none", "--vocab-size", 9999, "--output", tmp_path / "tok.model")
    assert done.returncode == 2 and "give --overwrite" in done.stderr
    assert (tmp_path / "tok.model").read_text() == "dear"


def test_config_names_what_transformers_needs(huggingface):
    config = json.loads((huggingface.file.parent / "tokenizer_config.json").read_text())
    assert [config["bos_token"], config["eos_token"]] == list(HUGGINGFACE_TOKENS)
