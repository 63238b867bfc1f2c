"""Merged shards: the files of the single run, and sets that are incomplete or do not fit."""

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.data.indexed import bin_path, idx_path
from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.verify import verify

from .corpora import documents, lines, merge, pair, preprocess, texts, write


def write_bad(path: Path, texts: list[str]) -> Path:
    """Lines of which every second one is no document."""
    path.write_bytes(lines(texts).replace(b"\n", b"\n[]\n"))
    return path


FLAGS: dict[str, Any] = {"text_split": "line", "append_eod": True, "prepend_bos": True, "skip_faults": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [
        write(folder / "a.jsonl", texts(70, 1)),
        write(folder / "b.jsonl.gz", texts(50, 2)),
        write(folder / "c.parquet", texts(90, 3)),
        write(folder / "d.txt", texts(40, 4)),
        write(folder / "e.jsonl", ["one"]),
        write_bad(folder / "f.jsonl", texts(9, 5)),
    ]


def shards(corpus, prefix: Path, count: int) -> list[Path]:
    """Preprocess all shards; returns their prefixes in order."""
    return [preprocess(corpus, prefix, shard=(i, count), **FLAGS).prefixes[0] for i in range(count)]


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("single") / "x"
    preprocess(corpus, prefix, **FLAGS)
    preprocess(corpus, prefix.with_name("unique"), dedup=True, **FLAGS)
    return {False: prefix.with_name("x_text_document"), True: prefix.with_name("unique_text_document")}


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_shards_give_the_single_run(tmp_path, corpus, single, count):
    parts = shards(corpus, tmp_path / "x", count)
    for dedup in (False, True):
        run = merge(parts, tmp_path / f"merged{dedup}", dedup=dedup)
        assert pair(tmp_path / f"merged{dedup}") == pair(single[dedup])
        said, wanted = read_manifest(tmp_path / f"merged{dedup}"), read_manifest(single[dedup])
        for name in ("documents", "tokens", "bin", "idx", "lengths", "encoded", "duplicates", "skipped", "tokenizer"):
            assert said[name] == wanted[name], name
        assert said["shard"] == "0/1" and len(said["merged"]) == count and not run.notes
        assert sum(entry["documents"] for entry in said["merged"]) == said["documents"] + (said["duplicates"] or 0)
        assert all(not check.fault for check in verify(tmp_path / f"merged{dedup}"))
    assert read_manifest(single[True])["duplicates"] > 10 and read_manifest(single[True])["skipped"] == 9


def test_empty_shards_belong_to_the_set(tmp_path):
    corpus = [write(tmp_path / "a.jsonl.gz", texts(30)), write(tmp_path / "b.jsonl", ["last"])]
    parts = shards(corpus, tmp_path / "x", 7)
    assert [read_manifest(part)["documents"] for part in parts] == [30, 0, 0, 0, 0, 0, 1]
    preprocess(corpus, tmp_path / "whole", append_eod=True, prepend_bos=True)
    merge(parts, tmp_path / "merged")
    assert pair(tmp_path / "merged") == pair(tmp_path / "whole_text_document")
    with pytest.raises(ValueError, match=r"1 of 7 shards .* missing .*x_text_document\.shard-00003-of-00007"):
        merge(parts[:3] + parts[4:], tmp_path / "merged", overwrite=True)


def test_shards_are_put_in_order_and_others_stay(tmp_path, corpus):
    parts = shards(corpus, tmp_path / "x", 3)
    other = preprocess([corpus[0]], tmp_path / "other", append_eod=True, prepend_bos=True).prefixes[0]
    run = merge([other, parts[2], parts[0], parts[1]], tmp_path / "merged")
    assert [one.prefix for one in run.inputs] == [other, *parts]
    assert any("in their own order" in note and "x_text_document" in note for note in run.notes)
    assert documents(tmp_path / "merged") == [ids for prefix in (other, *parts) for ids in documents(prefix)]


def test_shards_without_manifests_are_known_by_name(tmp_path, corpus, single):
    parts = shards(corpus, tmp_path / "x", 3)
    for part in parts:
        manifest_path(part).unlink()
    with pytest.raises(ValueError, match="shard-00001-of-00003"):
        merge([parts[0], parts[2]], tmp_path / "merged")
    merge(reversed(parts), tmp_path / "merged")
    assert pair(tmp_path / "merged") == pair(single[False])


def test_renamed_shards_are_known_by_manifest(tmp_path, corpus):
    parts = shards(corpus, tmp_path / "x", 2)
    for path in (bin_path, idx_path, manifest_path):
        path(parts[1]).rename(path(tmp_path / "renamed"))
    with pytest.raises(ValueError, match="shard-00001-of-00002"):
        merge(parts[:1], tmp_path / "merged")
    assert [one.prefix for one in merge([tmp_path / "renamed", parts[0]], tmp_path / "merged").inputs][0] == parts[0]


def test_sets_of_the_same_name_in_two_folders(tmp_path, corpus):
    a, b = shards(corpus[:1], tmp_path / "a/x", 2), shards(corpus[2:3], tmp_path / "b/x", 2)
    run = merge([a[0], b[1], a[1], b[0]], tmp_path / "merged")
    assert [one.prefix for one in run.inputs] == [*a, *b]


def test_a_file_that_changed_between_shards_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(30))
    first = shards([path], tmp_path / "x", 2)[0]
    write(path, texts(31))
    flags = {"append_eod": True, "prepend_bos": True, "overwrite": True}
    second = preprocess([path], tmp_path / "x", shard=(1, 2), **flags).prefixes[0]
    with pytest.raises(ValueError, match=r"do not continue each other at .*a\.jsonl"):
        merge([first, second], tmp_path / "merged")


def test_shards_of_different_inputs_are_refused(tmp_path):
    """The second shard's corpus has another file before it, so that it cuts the common one elsewhere."""
    common, other = write(tmp_path / "a.jsonl", texts(60)), write(tmp_path / "b.jsonl", texts(30))
    parts = [
        preprocess(inputs, tmp_path / "x", shard=(i, 2)).prefixes[0]
        for i, inputs in enumerate([[common], [other, common]])
    ]
    with pytest.raises(ValueError, match=r"do not continue each other at .*a\.jsonl"):
        merge(parts, tmp_path / "merged")


def test_merging_twice_keeps_the_sums(tmp_path, corpus):
    flags = {"text_split": "line", "dedup": True}
    parts = [preprocess([path], tmp_path / path.name[0], **flags).prefixes[0] for path in corpus[:3]]
    merge(parts[:2], tmp_path / "ab", dedup=True)
    merge([tmp_path / "ab", parts[2]], tmp_path / "abc", dedup=True)
    preprocess(corpus[:3], tmp_path / "whole", **flags)
    assert pair(tmp_path / "abc") == pair(tmp_path / "whole_text_document")
    said, wanted = read_manifest(tmp_path / "abc"), read_manifest(tmp_path / "whole_text_document")
    assert said["duplicates"] == wanted["duplicates"] and said["encoded"] == wanted["encoded"]
