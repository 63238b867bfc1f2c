"""Preprocessing beside what is there already, and what it refuses."""

from pathlib import Path

import pytest

from megatron_hybrid.data.encode import Encoding
from megatron_hybrid.data.filters import Filters
from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.manifest import read_manifest
from megatron_hybrid.data.preprocess import Job, Preprocessing

from .corpora import BYTES, corpus, documents, files, lines, pair, preprocess, texts_of, write


def test_an_old_report_goes_with_the_old_output(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x"]) + b"bad\n")
    run = preprocess([path], tmp_path / "out", skip_faults=True)
    assert run.report.exists()
    path.write_bytes(lines(["x"]))
    preprocess([path], tmp_path / "out", overwrite=True)
    assert not run.report.exists()


def test_an_output_without_all_its_files_is_not_complete(tmp_path):
    path = write(tmp_path / "a.jsonl", corpus(5))
    run = preprocess([path], tmp_path / "out")
    expected = pair(run.prefixes[0])
    for damage in (
        lambda p: bin_path(p).unlink(),
        lambda p: bin_path(p).write_bytes(b""),
        lambda p: idx_path(p).unlink(),
    ):
        damage(run.prefixes[0])
        assert pair(preprocess([path], tmp_path / "out", resume=True).prefixes[0]) == expected


def test_the_output_may_lie_among_the_inputs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]) + b"bad\n")
    for flags in ({}, {"overwrite": True}):
        run = preprocess([tmp_path], tmp_path / "out", skip_faults=True, **flags)
        assert texts_of(run.prefixes[0]) == ["x"] and run.done.skipped == 1


def test_why_nothing_is_left_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", ["x", "y"])
    with pytest.raises(ValueError, match=r'left out: 2 bad records\)\. The first: .*a.jsonl:1: no key "body"'):
        preprocess([path], tmp_path / "out", keys=("body",), skip_faults=True)
    with pytest.raises(ValueError, match=r"left out: 2 min_chars"):
        preprocess([path], tmp_path / "out", filters=Filters(min_chars=10))


def test_two_runs_on_one_output_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["x"])
    first = Preprocessing(Job((str(path),), tmp_path / "out", Encoding(BYTES)))
    first.start()
    with pytest.raises(ValueError, match="another process is writing the same output"):
        Preprocessing(Job((str(path),), tmp_path / "out", Encoding(BYTES), overwrite=True)).start()
    first.run()
    assert texts_of(first.prefixes[0]) == ["x"]


def test_existing_outputs(tmp_path):
    a, b = write(tmp_path / "a.jsonl", ["a"]), write(tmp_path / "b.jsonl", ["b"])
    preprocess([a], tmp_path / "out")
    with pytest.raises(ValueError, match="out_text_document.bin exists; give --overwrite"):
        preprocess([b], tmp_path / "out")
    with pytest.raises(ValueError, match="is complete, but of other inputs or flags"):
        preprocess([b], tmp_path / "out", resume=True)
    run = Preprocessing(Job((str(a),), tmp_path / "out", Encoding(BYTES), resume=True))
    assert run.start() == "complete already; nothing to do" and run.run()[0]["documents"] == 1
    preprocess([b], tmp_path / "out", overwrite=True)
    assert texts_of(tmp_path / "out_text_document") == ["b"] and not list(tmp_path.glob(".*"))


def test_a_resumed_run_has_to_be_the_same(tmp_path, small_batches):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(corpus(50)) + b"bad\n")
    with pytest.raises(ValueError, match=":51: "):
        preprocess([path], tmp_path / "out")
    with pytest.raises(ValueError, match=r"was another one \(changed: BOS and EOS, filters\)"):
        preprocess([path], tmp_path / "out", resume=True, append_eod=True, filters=Filters(min_chars=2))
    path.write_bytes(lines(corpus(50)))
    with pytest.raises(ValueError, match=r"was another one \(changed: inputs\)"):
        preprocess([path], tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"workers": 10_000}, "--workers 10000: at most"),
        ({"save_every": float("nan")}, "--save-every nan"),
        ({"memory_limit": -1}, "--tokenizer-memory"),
        ({"keys": ("a/b",)}, "it becomes part of a file's name"),
        ({"shard": (4, 4)}, "--shard 4/4"),
        ({"shard": (0, 2), "dedup": True}, "give --dedup to tools/merge_datasets.py"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"keys": ("text", "text")}, "a key is named twice"),
        ({"engine": "gigatoken"}, "it is for Hugging Face byte-level BPE only"),
    ],
)
def test_flags_that_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        preprocess([write(tmp_path / "a.jsonl", ["x"])], tmp_path / "out", **flags)
    assert list(files(tmp_path)) == ["a.jsonl"]


def test_standard_input_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="--resume: standard input"):
        preprocess([Path("-")], tmp_path / "out", resume=True)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_text_is_refused_but_not_a_shard(tmp_path, texts):
    path = write(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match="there is nothing to train on"):
        preprocess([path], tmp_path / "out")
    assert list(files(tmp_path)) == ["a.jsonl"]
    run = preprocess([path], tmp_path / "out", shard=(1, 3))
    assert documents(run.prefixes[0]) == [] and run.prefixes[0].name == "out_text_document.shard-00001-of-00003"
    assert read_manifest(run.prefixes[0])["documents"] == 0
