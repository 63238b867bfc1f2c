"""Preprocessing as a whole: the same data whatever the workers and the format."""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.data import dedup, encode
from megatron_hybrid.data.filters import Filters
from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.manifest import read_manifest
from megatron_hybrid.data.tokenizers import TokenizerSpec, load_tokenizer
from megatron_hybrid.files import checksum
from tests.support.processes import python

from .corpora import command, corpus, documents, files, lines, pair, preprocess, texts_of, train_bpe, write


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = train_bpe(corpus(50), 700, tmp_path_factory.mktemp("bpe") / "tok")
    return TokenizerSpec("HuggingFaceTokenizer", folder)


# --- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eod"), [(False, False), (True, False), (False, True), (True, True)])
def test_documents_are_marked_and_empty_ones_left_out(tmp_path, bos, eod):
    path = write(tmp_path / "a.jsonl", ["first text", "", "second"])
    run = preprocess([path], tmp_path / "out", prepend_bos=bos, append_eod=eod)
    expected = [[256] * bos + list(text.encode()) + [257] * eod for text in ("first text", "second")]
    assert documents(run.prefixes[0]) == expected
    found = read_manifest(run.prefixes[0])
    assert (found["documents"], found["tokens"], found["encoded"]["empty"]) == (2, sum(map(len, expected)), 1)
    assert found["encoded"]["bytes_per_token"] == 1 and found["encoded"]["text_bytes"] == 16


def test_the_manifest(tmp_path, bpe):
    texts = corpus(20)
    path = write(tmp_path / "a.jsonl.gz", texts)
    run = preprocess([path], tmp_path / "v1.5", bpe, append_eod=True, command=("tool", "--flag"))
    prefix = tmp_path / "v1.5_text_document"
    assert run.prefixes == [prefix] and files(tmp_path).keys() >= {f"{prefix.name}.{e}" for e in ("bin", "idx", "json")}
    found = read_manifest(prefix)
    ids = documents(prefix)
    assert (found["documents"], found["tokens"]) == (20, sum(map(len, ids))) and found["command"] == ["tool", "--flag"]
    assert sum(found["lengths"]["histogram"].values()) == 20 and found["lengths"]["max"] == max(map(len, ids))
    assert found["bin"] == {"size": bin_path(prefix).stat().st_size, "checksum": checksum(bin_path(prefix))}
    assert found["idx"] == {"size": idx_path(prefix).stat().st_size, "checksum": checksum(idx_path(prefix))}
    assert found["inputs"] == [{"path": str(path), "size": path.stat().st_size, "checksum": checksum(path)}]
    tokenizer = load_tokenizer(bpe)
    assert found["tokenizer"]["fingerprint"] == tokenizer.fingerprint and found["tokenizer"]["append_eod"]
    bytes_, tokens = sum(len(text.encode()) for text in texts), found["tokens"] - 20
    assert found["encoded"]["bytes_per_token"] == pytest.approx(bytes_ / tokens)
    assert [tokenizer.decode(ids_[:-1]) for ids_ in ids] == texts


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
def test_workers_do_not_change_the_files(tmp_path, small_batches, bpe, engine):
    texts = corpus(120, most=60)
    path = write(tmp_path / "a.jsonl", texts)
    seen = set()
    for workers in (1, 2, 5):
        for verify in (False, True) if engine == "gigatoken" else (False,):
            prefix = tmp_path / f"{workers}{verify}"
            run = preprocess([path], prefix, bpe, engine=engine, workers=workers, verify_tokens=verify)
            seen.add(pair(run.prefixes[0]))
    assert len(seen) == 1
    reference = load_tokenizer(bpe)
    assert documents(tmp_path / "1False_text_document") == [list(map(int, reference.encode([t]).ids)) for t in texts]


def test_formats_do_not_change_the_files(tmp_path, small_batches):
    texts = [text.replace("\n", " ") for text in corpus(100)]
    seen = set()
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz"):
        path = write(tmp_path / kind / f"a.{kind}", texts)
        run = preprocess([path], tmp_path / kind / "out", text_split="line", workers=2)
        seen.add(pair(run.prefixes[0]))
    assert len(seen) == 1 and texts_of(run.prefixes[0]) == texts


def test_a_slow_batch_keeps_its_place(tmp_path, small_batches, monkeypatch):
    texts = corpus(60, most=40)
    path = write(tmp_path / "a.jsonl", texts)
    slow = encode.Encoder.encode

    def late(self, batch):
        if batch.first == 0:
            time.sleep(0.3)
        return slow(self, batch)

    monkeypatch.setattr(encode.Encoder, "encode", late)
    assert texts_of(preprocess([path], tmp_path / "out", workers=3).prefixes[0]) == texts


def test_several_keys_make_a_data_set_each(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t1", "body": {"text": "b1"}}\n{"title": "", "body": {"text": "b2"}}\n')
    run = preprocess([path], tmp_path / "out", keys=("title", "body.text"))
    assert [prefix.name for prefix in run.prefixes] == ["out_title_document", "out_body.text_document"]
    assert [texts_of(prefix) for prefix in run.prefixes] == [["t1"], ["b1", "b2"]]


def test_ids_outside_the_vocabulary_are_impossible(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["ok", "ÿ"])
    monkeypatch.setattr("megatron_hybrid.data.tokenizers.ByteTokenizer.vocab_size", 150)
    with pytest.raises(ValueError, match=r"ids from 107 to 195, but the vocabulary has 150"):
        preprocess([path], tmp_path / "out")
    assert list(files(tmp_path)) == ["a.jsonl"]


def test_ids_that_gigatoken_gets_wrong_are_corrected_by_verification(tmp_path, bpe, monkeypatch):
    """A fast library that fails on one word only, which the sample does not have."""
    from megatron_hybrid.data import gigatokens

    right = gigatokens.GigatokenTokenizer.encode

    def wrong(self, texts):
        return right(self, [text.replace("rare", "fare") for text in texts])

    monkeypatch.setattr(gigatokens.GigatokenTokenizer, "encode", wrong)
    texts = [*corpus(30), "a rare word " + "x " * 2000]
    path = write(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr("megatron_hybrid.data.preprocess.SAMPLE_BYTES", 2000)
    expected = preprocess([path], tmp_path / "slow", bpe, engine="tokenizers")
    verified = preprocess([path], tmp_path / "fast", bpe, verify_tokens=True)
    assert pair(verified.prefixes[0]) == pair(expected.prefixes[0]) and verified.done.corrected == 1
    assert pair(preprocess([path], tmp_path / "not", bpe).prefixes[0]) != pair(expected.prefixes[0])


# --- filters and duplicates --------------------------------------------------------------------------


def test_filters_leave_out_and_count(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "good one", "!!!???", "x" * 50])
    run = preprocess([path], tmp_path / "out", filters=Filters(2, 20, 0.5))
    assert texts_of(run.prefixes[0]) == ["good one"]
    counts = read_manifest(run.prefixes[0])["encoded"]["filtered"]
    assert counts == {"min_chars": 1, "max_chars": 1, "min_alphanumeric": 1}


def test_the_first_of_equal_documents_stays(tmp_path, small_batches):
    rng = random.Random(0)
    some = corpus(40, most=20)
    texts = [rng.choice(some) for _ in range(300)]
    path = write(tmp_path / "a.jsonl", texts)
    run = preprocess([path], tmp_path / "out", dedup=True, append_eod=False, workers=2)
    assert texts_of(run.prefixes[0]) == list(dict.fromkeys(texts))
    found = read_manifest(run.prefixes[0])
    assert found["duplicates"] == 300 - found["documents"] and found["encoded"]["documents"] == 300
    plain = preprocess([write(tmp_path / "b.jsonl", list(dict.fromkeys(texts)))], tmp_path / "plain")
    assert pair(run.prefixes[0]) == pair(plain.prefixes[0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 7))
def test_duplicates_are_found_in_any_number_of_passes(tmp_path_factory, values, most):
    path = tmp_path_factory.mktemp("dedup") / "digests"
    ids = np.repeat(np.array(values, dtype=np.uint16), 2)
    path.write_bytes(dedup.digests(ids, np.full(len(values), 2)))
    keep = np.zeros(len(values), dtype=bool)
    count = dedup.mark_first(path, keep, most)
    assert keep.tolist() == [value not in values[:i] for i, value in enumerate(values)]
    assert count == len(values) - len(set(values))


# --- bad records -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_record_stops_the_run_and_nothing_appears(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["good"] * 10) + b"bad\n")
    with pytest.raises(ValueError, match=r"a.jsonl:11: not valid JSON"):
        preprocess([path], tmp_path / "out", workers=workers)
    assert list(files(tmp_path)) == ["a.jsonl"]


def test_bad_records_are_skipped_and_listed(tmp_path, small_batches):
    good = [text.replace("\n", " ") for text in corpus(90)]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    a.write_bytes(b"bad\n" + lines(good[:30]) + b'{"no": 1}\n')
    whole = write(tmp_path / "whole.jsonl.gz", good[30:60]).read_bytes()
    b.write_bytes(whole[: len(whole) * 2 // 3])
    c = write(tmp_path / "c.jsonl", good[60:])
    run = preprocess([a, b, c], tmp_path / "out", skip_faults=True, workers=2)
    found = texts_of(run.prefixes[0])
    kept = len(found) - 60
    assert 5 < kept < 30 and found == good[: 30 + kept] + good[60:]
    report = [json.loads(line) for line in run.report.read_text().splitlines()]
    assert [(Path(r["file"]).name, r["line"]) for r in report] == [
        *(("a.jsonl", 1), ("a.jsonl", 32), ("b.jsonl.gz", kept))
    ]
    assert "truncated gzip" in report[2]["reason"] and run.done.skipped == 3
    manifest = read_manifest(run.prefixes[0])
    assert manifest["skipped"] == 3 and [bool(i["checksum"]) for i in manifest["inputs"]] == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.text(max_size=20).map(lambda t: lines([t])[:-1]), max_size=10))
def test_any_input_gives_the_good_documents_or_a_named_fault(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.jsonl").write_bytes(b"\n".join(found))
    good = []
    for line in (folder / "a.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
            good += [text] if text and "\0" not in text else []
        except (ValueError, TypeError, KeyError, IndexError):
            pass
    try:
        run = preprocess([folder / "a.jsonl"], folder / "out", skip_faults=True, workers=2)
        assert texts_of(run.prefixes[0]) == good
    except ValueError as error:
        assert not good and "no document with text" in str(error)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path / "a") + b"\xff.jsonl"
    with open(name, "wb") as stream:
        stream.write(lines(["x"]) + b"bad\n")
    done = subprocess.run(command(tmp_path, tmp_path / "out", "--on-error", "skip"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out_text_document")["inputs"][0]["path"] == os.fsdecode(name)


# --- start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer", "merge_datasets", "inspect_dataset"])
def test_help_imports_nothing_heavy(tool):
    """What makes a start slow; the time itself is in the benchmark's report."""
    code = f"""
import runpy, sys
sys.argv = ["tool", "--help"]
try:
    runpy.run_path("tools/{tool}.py", run_name="__main__")
except SystemExit:
    pass
heavy = {{"torch", "megatron", "numpy", "tokenizers", "sentencepiece", "pyarrow", "awkward", "matplotlib", "yaml"}}
sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_run_imports_torch_or_megatron(tmp_path, bpe):
    path = write(tmp_path / "a.jsonl", corpus(5))
    words = ["tool", "--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-model", bpe.model]
    code = f"""
import runpy, sys
sys.argv = {list(map(str, words))!r}
runpy.run_path("tools/preprocess_data.py", run_name="__main__")
sys.exit(str({{"torch", "megatron"}} & set(sys.modules)) if {{"torch", "megatron"}} & set(sys.modules) else 0)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "gigatoken" in done.stdout and "5 documents" in done.stdout
