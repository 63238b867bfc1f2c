"""Preprocessing that is killed, stopped or out of space: a resumed run writes the same files."""

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

import pytest

from megatron_hybrid.data.encode import Encoding
from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.manifest import read_manifest
from megatron_hybrid.data.output import Output
from megatron_hybrid.data.preprocess import Job, Preprocessing
from tests.support.processes import BOUND_S

from .corpora import BYTES, command, corpus, lines, pair, preprocess, texts_of, write


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
        _, errors = stdin.communicate(timeout=BOUND_S)
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
    assert os.strerror(errno.EFBIG) in failed.stderr and "free some space" in failed.stderr
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
