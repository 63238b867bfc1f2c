"""Preprocessing as a whole: the same data whatever the workers, the format and the interruptions."""

import errno
import inspect
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.data import batches, dedup, encode
from megatron_hybrid.data.encode import Encoding
from megatron_hybrid.data.filters import Filters
from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.manifest import read_manifest
from megatron_hybrid.data.output import Output
from megatron_hybrid.data.preprocess import Job, Preprocessing
from megatron_hybrid.data.tokenizers import TokenizerSpec, load_tokenizer
from megatron_hybrid.files import checksum

from .corpora import BYTES, documents, files, lines, preprocess, texts_of, train_bpe, write

ROOT = Path(__file__).resolve().parents[2]


def corpus(count, seed=3, most=400):
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma(x)", "naïve", "漢字", "  ", "\n\n", "1234"]
    return [f"{rng.random()} " + " ".join(rng.choices(words, k=rng.randrange(1, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = train_bpe(corpus(50), 700, tmp_path_factory.mktemp("bpe") / "tok")
    return TokenizerSpec("HuggingFaceTokenizer", folder)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(batches, "BATCH_BYTES", 2000)
    monkeypatch.setattr("megatron_hybrid.data.parquet.BATCH_BYTES", 2000)


def pair(prefix):
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


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


def test_a_run_that_stopped_late_goes_on_skipping(tmp_path, small_batches):
    """The work before a bad record at the end of a corpus is not lost."""
    good = corpus(80)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(good[:70]) + b"bad\n" + lines(good[70:]))
    with pytest.raises(ValueError, match=r":71: "):
        preprocess([path], tmp_path / "out", workers=2)
    with pytest.raises(ValueError, match="an unfinished run left .*--resume to continue"):
        preprocess([path], tmp_path / "out")
    job = Job((str(path),), tmp_path / "out", Encoding(BYTES, skip_faults=True), resume=True)
    run = Preprocessing(job)
    assert 50 < int(run.start().removeprefix("resumed after ").split()[0]) <= 70
    run.run()
    assert texts_of(run.prefixes[0]) == good
    straight = preprocess([path], tmp_path / "straight", skip_faults=True)
    assert pair(run.prefixes[0]) == pair(straight.prefixes[0])
    assert run.report.read_bytes() == straight.report.read_bytes()


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


# --- interruptions -----------------------------------------------------------------------------------


def command(path, prefix, *flags):
    words = ["--input", path, "--output-prefix", prefix, "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, words), *flags]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_killed_anywhere_and_resumed_the_files_are_the_same(tmp_path, kind):
    """kill -9 at random moments: between two states on disk, while they are written, while files get their names."""
    rng = random.Random(kind)
    inputs = tmp_path / "in"
    texts = corpus(12_000, most=250)
    texts[50:100] = texts[:50]
    for i in range(3):
        write(inputs / f"{i}.{kind}", texts[i * 4000 : i * 4000 + 4000] + texts[:2000])
    straight = subprocess.run(command(inputs, tmp_path / "whole", "--dedup", "exact"), capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    expected = pair(tmp_path / "whole_text_document")
    state = tmp_path / ".out_text_document.unfinished" / "state.json"

    def saved():
        try:
            return state.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    kills = resumed = 0
    while kills < 8:
        process = subprocess.Popen(
            command(inputs, tmp_path / "out", "--dedup", "exact", "--resume", "--save-every", "0", "--workers", "2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = saved()
        while process.poll() is None and saved() == before:
            time.sleep(0.001)  # until it works
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        out, errors = process.communicate()
        resumed += "resumed after" in out
        if process.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.returncode == 0, errors
        assert pair(tmp_path / "out_text_document") == expected
        for path in tmp_path.glob("out*"):
            path.unlink()  # it was complete: kill the next run from its start
    assert resumed >= 3
    done = subprocess.run(
        command(inputs, tmp_path / "out", "--dedup", "exact", "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert pair(tmp_path / "out_text_document") == expected
    ours, theirs = (read_manifest(tmp_path / f"{name}_text_document") for name in ("out", "whole"))
    different = {name for name in ours if ours[name] != theirs[name]}
    assert different == {"name", "command"}
    assert not list(tmp_path.glob(".*")), "no hidden files are left"


@pytest.mark.parametrize("step", range(5))
def test_killed_while_files_get_their_names(tmp_path, monkeypatch, step):
    """The renaming stops after any number of steps; a resumed run finishes it, with or without an old data set."""
    path = write(tmp_path / "a.jsonl", corpus(30))
    expected = pair(preprocess([path], tmp_path / "whole").prefixes[0])
    preprocess([write(tmp_path / "old.jsonl", ["old"])], tmp_path / "out")
    count = iter(range(100))
    replace = Path.replace

    def stop(self, target):
        if self.parent.name.endswith(".unfinished") and not self.name.startswith(".") and next(count) == step:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    try:
        preprocess([path], tmp_path / "out", overwrite=True)
        assert step >= 3
    except KeyboardInterrupt:
        found = [bin_path(tmp_path / "out_text_document").exists(), idx_path(tmp_path / "out_text_document").exists()]
        assert found != [True, True] or step == 2, "an old and a new file never stand together"
    monkeypatch.undo()
    run = preprocess([path], tmp_path / "out", resume=True)
    assert pair(run.prefixes[0]) == expected and not list(tmp_path.glob(".*"))


def test_ctrl_c_and_termination_keep_what_was_done(tmp_path):
    path = write(tmp_path / "a.jsonl", corpus(12_000, most=250))
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        prefix = tmp_path / str(code)
        words = command("-", prefix, "--workers", "1")
        stdin = subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert stdin.stdin is not None
        stdin.stdin.write(path.read_text()[:5_000_000])
        stdin.stdin.flush()
        time.sleep(0.5)
        stdin.send_signal(number)
        _, errors = stdin.communicate(timeout=20)
        assert stdin.returncode == code and "Traceback" not in errors
        assert not bin_path(prefix).exists()


def test_a_full_disk_leaves_no_output_and_can_be_resumed(tmp_path, small_batches):
    """A limit on the size of files stands for a full disk: the same write fails the same way."""
    path = write(tmp_path / "a.jsonl", corpus(2000))
    size = len(pair(preprocess([path], tmp_path / "whole").prefixes[0])[0])

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    failed = subprocess.run(
        command(path, tmp_path / "out", "--save-every", "0"), capture_output=True, text=True, preexec_fn=limit
    )
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert os.strerror(errno.EFBIG) in failed.stderr and "make room" in failed.stderr
    assert "documents are kept; the same command with --resume continues" in failed.stderr
    assert not list(tmp_path.glob("out*"))
    done = subprocess.run(command(path, tmp_path / "out", "--resume"), capture_output=True, text=True)
    assert done.returncode == 0 and "resumed after" in done.stdout, done.stderr
    expected = preprocess([path], tmp_path / "marked", append_eod=True)
    assert pair(tmp_path / "out_text_document") == pair(expected.prefixes[0])


def test_a_full_disk_at_the_second_key_keeps_both_keys_together(tmp_path):
    """The first key's file has the batch already; the state may not speak of it."""
    path = tmp_path / "a.jsonl"
    rng = random.Random(1)
    with path.open("w") as stream:
        for _ in range(8000):
            stream.write(json.dumps({"a": "x" * rng.randrange(60), "b": "y" * rng.randrange(1500)}) + "\n")
    words = [*command(path, tmp_path / "out", "--save-every", "0"), "--text-key", "a", "b"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    failed = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode == 2 and "documents are kept" in failed.stderr, failed.stderr
    done = subprocess.run([*words, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0 and "resumed after" in done.stdout, done.stderr
    run = preprocess([path], tmp_path / "whole", keys=("a", "b"), append_eod=True)
    for prefix in run.prefixes:
        assert pair(tmp_path / prefix.name.replace("whole", "out")) == pair(prefix)


@pytest.mark.parametrize("step", range(8))
def test_an_interruption_between_the_files_of_a_batch_loses_and_doubles_nothing(tmp_path, small_batches, step):
    """Ctrl-C after any number of the lines that append a batch, with faults to report and digests to keep."""
    path = tmp_path / "a.jsonl"
    texts = [f"text {i} " * 20 for i in range(100)]
    path.write_bytes(b"".join(line + b"bad\n" for line in lines(texts).splitlines(keepends=True)))
    source, first = inspect.getsourcelines(Output.add)
    statements = [first + i for i, line in enumerate(source) if i > 1 and line.strip()]

    def trace(frame, event, argument):
        if event == "call":
            return trace if frame.f_code is Output.add.__code__ else None
        late = frame.f_locals["self"].done.documents > 30
        if event == "line" and late and frame.f_lineno == statements[step * len(statements) // 8]:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        preprocess([path], tmp_path / "out", skip_faults=True, dedup=True)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    run = preprocess([path], tmp_path / "out", skip_faults=True, dedup=True, resume=True)
    assert texts_of(run.prefixes[0]) == texts
    report = [json.loads(line)["line"] for line in run.report.read_text().splitlines()]
    assert report == list(range(2, 201, 2))


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


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path / "a") + b"\xff.jsonl"
    with open(name, "wb") as stream:
        stream.write(lines(["x"]) + b"bad\n")
    done = subprocess.run(command(tmp_path, tmp_path / "out", "--on-error", "skip"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out_text_document")["inputs"][0]["path"] == os.fsdecode(name)


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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gigatoken" in done.stdout and "5 documents" in done.stdout
