"""Merged data sets: the bytes that upstream's builder writes, what is refused, and the tool."""

import functools
import gc
import json
import os
import resource

import numpy as np
import pytest

from megatron_hybrid.data.indexed import bin_path, idx_path, read_index
from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.merge_inputs import find_prefixes
from megatron_hybrid.data.verify import verify
from tests.support import processes

from .corpora import data_set, merge, pair, preprocess, texts, train_bpe, write

tool = functools.partial(processes.tool, "merge_datasets")


@pytest.fixture(scope="module")
def upstream():
    from megatron.core.datasets import indexed_dataset

    gc.freeze()  # upstream collects garbage at each input, which takes long with all that torch brings
    yield indexed_dataset
    gc.unfreeze()


def merge_upstream(upstream, inputs, prefix, dtype):
    builder = upstream.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for one in inputs:
        builder.add_index(str(one))
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("several", [False, True])
def test_bytes_are_those_of_upstreams_builder(tmp_path, upstream, dtype, several):
    inputs = [
        data_set(tmp_path / "a", [3, 1, 4, 1, 5], [0, 2, 2, 5] if several else None, dtype, 1),
        data_set(tmp_path / "b", [], None, dtype, 2),
        data_set(tmp_path / "c", [9, 2, 6], None, dtype, 3),
        data_set(tmp_path / "d", [5, 0, 5], [0, 1, 3] if several else None, dtype, 4),
    ]
    merge(inputs, tmp_path / "ours")
    merge_upstream(upstream, inputs, tmp_path / "theirs", dtype)
    assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")
    assert not list(tmp_path.glob(".*"))


def test_blocks_do_not_show(tmp_path, upstream, monkeypatch):
    """Blocks smaller than the inputs give the same bytes as upstream's copy in one go."""
    from megatron_hybrid.data import indexed, merge_inputs

    monkeypatch.setattr(indexed, "_BLOCK", 7)
    whole = merge_inputs.token_blocks
    monkeypatch.setattr(merge_inputs, "token_blocks", lambda lengths: whole(lengths, 640))
    lengths = np.random.default_rng(5).integers(1, 1000, 300).tolist()
    inputs = [
        data_set(tmp_path / name, lengths[i : i + 100], [0, *range(1, 100, 3), 100]) for i, name in enumerate("abc")
    ]
    merge(inputs, tmp_path / "ours")
    merge_upstream(upstream, inputs, tmp_path / "theirs", np.uint16)
    assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")


# --- inputs ----------------------------------------------------------------------------------------


def test_names_and_globs(tmp_path):
    for name in ("b.1", "a", "c"):
        data_set(tmp_path / name, [1, 2])
    a, b, c = (tmp_path / name for name in ("a", "b.1", "c"))
    assert find_prefixes([f"{tmp_path}/*"]) == [a, b, c]
    assert find_prefixes([f"{c}.idx", f"{tmp_path}/[ab]*.idx"]) == [c, a, b]
    # What a shell makes of a pattern that is not quoted.
    manifest_path(a).write_text("{}")
    assert find_prefixes(sorted(str(path) for path in tmp_path.iterdir())) == [a, b, c]
    for twice in ([str(a), str(a)], [f"{a}.bin", str(a)], [f"{tmp_path}/*", f"{c}.bin"], [f"{a}.idx", f"{a}.idx"]):
        with pytest.raises(ValueError, match="listed twice"):
            find_prefixes(twice)
    os.symlink(bin_path(a), tmp_path / "link.bin")
    os.symlink(idx_path(a), tmp_path / "link.idx")
    with pytest.raises(ValueError, match="listed twice"):
        find_prefixes([str(a), str(tmp_path / "link")])
    with pytest.raises(ValueError, match="matches no"):
        find_prefixes([f"{tmp_path}/x*"])


def test_what_is_refused(tmp_path):
    a, b = data_set(tmp_path / "a", [3, 4]), data_set(tmp_path / "b", [3, 4], dtype=np.int32)
    several = data_set(tmp_path / "s", [3, 4], [0, 2])
    empty = data_set(tmp_path / "e", [])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"a has ids of uint16, .*b of int32"):
        merge([a, b], out)
    with pytest.raises(ValueError, match="several sequences"):
        merge([a, several], out, dedup=True)
    with pytest.raises(ValueError, match="is one of the inputs"):
        merge([a, several], a, overwrite=True)
    with pytest.raises(ValueError, match="leave .bin out"):
        merge([a], tmp_path / "out.bin")
    with pytest.raises(ValueError, match="no document"):
        merge([empty], out)
    with pytest.raises(ValueError, match=r"there is no .*none\.idx"):
        merge([a, tmp_path / "none"], out)
    with bin_path(a).open("ab") as stream:
        stream.write(b"xx")
    with pytest.raises(ValueError, match=r"a\.bin has 16 bytes, but its index says 14"):
        merge([several, a], out)
    bin_path(a).unlink()
    with pytest.raises(ValueError, match=r"there is no .*a\.bin"):
        merge([a], out)
    idx_path(several).write_bytes(idx_path(several).read_bytes()[:-8] + (5).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="the last document ends at sequence 5 of 2"):
        merge([several], out)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("out*"))


def test_an_output_is_kept_unless_it_may_be_replaced(tmp_path):
    a, b = data_set(tmp_path / "a", [3, 4]), data_set(tmp_path / "b", [5], seed=1)
    merge([a], tmp_path / "out")
    before = pair(tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        merge([a, b], tmp_path / "out")
    assert pair(tmp_path / "out") == before
    merge([a, b], tmp_path / "out", overwrite=True)
    assert read_index(tmp_path / "out").lengths.tolist() == [3, 4, 5]
    assert not list(tmp_path.glob(".*"))


def test_other_tokenizers_and_marks_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(40))
    plain = preprocess([path], tmp_path / "plain").prefixes[0]
    marked = preprocess([path], tmp_path / "marked", append_eod=True).prefixes[0]
    from megatron_hybrid.data.tokenizers import TokenizerSpec

    spec = TokenizerSpec("HuggingFaceTokenizer", train_bpe(texts(40), 300, tmp_path / "bpe"))
    other = preprocess([path], tmp_path / "other", spec).prefixes[0]
    with pytest.raises(
        ValueError, match=r"plain_text_document and .*marked_text_document differ in EOD .*none and id 257"
    ):
        merge([plain, marked], tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"plain_text_document and .*other_text_document differ in tokenizer fingerprint"
    ):
        merge([plain, other], tmp_path / "out")


def test_without_a_manifest_the_merge_says_so(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(40))
    ours = preprocess([path], tmp_path / "ours").prefixes[0]
    run = merge([ours, data_set(tmp_path / "theirs", [3, 4])], tmp_path / "out")
    assert any("without a manifest" in note and "theirs" in note for note in run.notes)
    said = read_manifest(tmp_path / "out")
    assert said["tokenizer"] is None and said["encoded"] is None and said["skipped"] is None
    assert [entry["manifest"] for entry in said["merged"]] == [True, False]
    assert [entry["path"] for entry in said["inputs"]] == [str(path)]
    assert said["documents"] == 42 and all(not check.fault for check in verify(tmp_path / "out"))


@pytest.mark.parametrize("dedup", [False, True])
def test_an_input_that_is_not_its_manifests_is_refused(tmp_path, dedup):
    one = preprocess([write(tmp_path / "a.jsonl", texts(40))], tmp_path / "one").prefixes[0]
    content = bytearray(bin_path(one).read_bytes())
    content[-1] ^= 1
    bin_path(one).write_bytes(content)
    with pytest.raises(ValueError, match="not what its manifest says"):
        merge([one], tmp_path / "out", dedup=dedup)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))
    said = json.loads(manifest_path(one).read_text())
    manifest_path(one).write_text(json.dumps(said | {"documents": 39}))
    with pytest.raises(ValueError, match="says 39 documents"):
        merge([one], tmp_path / "out", dedup=dedup)


# --- the tool --------------------------------------------------------------------------------------


def test_tool_merges_many_with_few_open_files(tmp_path):
    """More inputs than a process may have files open."""
    for number in range(90):
        data_set(tmp_path / f"d{number:02}", [number + 1], seed=number)
    done = tool(
        *("--input", tmp_path / "d*", "--output-prefix", tmp_path / "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)),
    )
    assert done.returncode == 0, done.stderr
    assert "90 data sets, 90 documents, 4,095 tokens" in done.stdout
    again = tool("--input", tmp_path / "d*", "--output-prefix", tmp_path / "out")
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("dedup", [(), ("--dedup", "exact")])
def test_a_full_disk_leaves_nothing(tmp_path, dedup):
    """A limit on the size of files stands for the disk."""
    inputs = [data_set(tmp_path / name, [20_000] * 5, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    done = tool(
        *("--input", *inputs, "--output-prefix", tmp_path / "out", *dedup),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.returncode == 2 and "free some space" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


KILLED_AT = """
import os, signal, sys
from pathlib import Path

dedup, out, wanted, *inputs = sys.argv[1:]
from megatron_hybrid.data.indexed import IndexedWriter
from megatron_hybrid.data.merge import Merge, MergeJob

count = stop = 0


def counted(original):
    def call(*args, **flags):
        global count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **flags)

    return call


for kind, names in ((Path, ("replace", "unlink", "mkdir")), (IndexedWriter, ("add", "finish"))):
    for name in names:
        setattr(kind, name, counted(getattr(kind, name)))
files = [Path(out + ending) for ending in (".bin", ".idx", ".json")]


def merge(at):
    global stop
    child = os.fork()
    if not child:
        stop = at
        Merge(MergeJob(tuple(inputs), Path(out), dedup == "True")).run()
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there = [file.suffix for file in files if file.exists()]
    if ".idx" in there:  # without it nothing reads the data set
        for ending in (".bin", ".idx"):
            assert Path(out + ending).read_bytes() == Path(wanted + ending).read_bytes()
    return ended, *there


for at in range(1, 40):
    first = merge(at)
    print(*first)
    assert first[0] == 0 or merge(0) == (0, ".bin", ".idx", ".json")
    for file in files:
        os.unlink(file)
    if first[0] == 0:
        break
"""


@pytest.mark.parametrize("dedup", [False, True])
def test_a_killed_merge_leaves_nothing_half(tmp_path, dedup):
    """Killed before each step of writing and of giving the files their names, then merged anew."""
    inputs = [data_set(tmp_path / name, [200] * 7, seed=seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    merge(inputs, tmp_path / "wanted", dedup=dedup)
    out = tmp_path / "out"
    done = processes.python("-c", KILLED_AT, dedup, out, tmp_path / "wanted", *inputs)
    assert done.returncode == 0, done.stderr
    *killed, last = done.stdout.splitlines()
    assert last == "0 .bin .idx .json" and len(killed) > 8
    assert set(killed) == {"-9", "-9 .bin", "-9 .bin .idx"}
    assert not list(tmp_path.glob(".*"))
