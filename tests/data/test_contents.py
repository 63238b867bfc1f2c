"""What a data set is, by its content; that it is whole; which ids it has."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.contents import examine
from megatron_hybrid.data.fingerprint import fingerprint, first_twins
from megatron_hybrid.data.ids import Range, scan
from megatron_hybrid.data.indexed import IndexedWriter, bin_path, idx_path, read_index
from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.merge import Merge, MergeJob
from megatron_hybrid.data.verify import verify

from .corpora import preprocess, write


def data_set(prefix: Path, texts: list[list[int]], dtype=np.uint16) -> Path:
    """A data set without a manifest."""
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(dtype)) as writer:
        for text in texts:
            writer.add(np.array(text, dtype=dtype), np.array([len(text)]))
        writer.finish()
    return prefix


def test_a_data_set_is_its_content_whatever_it_is_called(tmp_path):
    texts = [[n] * 10 for n in range(50)]
    own = data_set(tmp_path / "own", texts)
    for end in (".bin", ".idx"):
        shutil.copy(f"{own}{end}", tmp_path / f"copied{end}")
        os.link(f"{own}{end}", tmp_path / f"hard{end}")
        os.symlink(f"{own}{end}", tmp_path / f"soft{end}")
    names = ["copied", "hard", "soft", f"../{tmp_path.name}/own"]
    for name in names:
        assert fingerprint(tmp_path / name) == fingerprint(own)
        assert first_twins([str(own), f"{tmp_path}/{name}"]) == (str(own), f"{tmp_path}/{name}")
    # the same sizes and the same index, and other documents
    shuffled = data_set(tmp_path / "shuffled", texts[::-1])
    assert fingerprint(shuffled).order == fingerprint(own).order
    assert fingerprint(shuffled).content != fingerprint(own).content
    # the same tokens, cut into other documents
    cut = data_set(tmp_path / "cut", [text for n in range(0, 50, 2) for text in ([n] * 9, [n] + [n + 1] * 10)])
    assert bin_path(cut).read_bytes() == bin_path(own).read_bytes()
    assert first_twins(map(str, (own, shuffled, cut))) is None


def damaged(prefix: Path, bin_: bytes | None = None, idx: bytes | None = None) -> str:
    """What is said of a data set with other bytes, in one paragraph."""
    kept = [path.read_bytes() for path in (bin_path(prefix), idx_path(prefix))]
    for path, content in ((bin_path(prefix), bin_), (idx_path(prefix), idx)):
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        examine(str(prefix))
    for path, content in zip((bin_path(prefix), idx_path(prefix)), kept, strict=True):
        path.write_bytes(content)
    return str(error.value)


def test_what_is_not_whole_is_refused(tmp_path):
    prefix = data_set(tmp_path / "a", [[1, 2, 3], [4, 5]])
    ids, index = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
    assert "a.bin has 8 bytes, but by its index 5 tokens of uint16 take 10" in damaged(prefix, ids[:-2])
    assert "a.bin has 12 bytes" in damaged(prefix, ids + b"\0\0")
    offset = 34 + 2 * 4 + 8  # of the second document
    moved = index[:offset] + struct.pack("<q", 8) + index[offset + 8 :]
    assert "a.idx is corrupt: sequence 1 is said to begin at byte 8" in damaged(prefix, idx=moved)
    assert "is truncated" in damaged(prefix, idx=index[:-1])
    assert "has no tokens (2 documents)" in damaged(data_set(tmp_path / "hollow", [[], []]))
    assert "has no tokens (0 documents)" in damaged(data_set(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="there is no .*none.idx: give the prefix"):
        examine(str(tmp_path / "none"))


def test_a_manifest_that_other_files_were_put_beside_is_refused(tmp_path):
    run = preprocess([write(tmp_path / "c.jsonl", ["one", "two"])], tmp_path / "d", append_eod=True)
    prefix = run.prefixes[0]
    assert examine(str(prefix))[3:] == (Range(101, 257), 258)
    # of the same index: only their ages tell that the manifest may not know these ids
    os.utime(bin_path(prefix), ns=(0, manifest_path(prefix).stat().st_mtime_ns + 1))
    assert examine(str(prefix))[3:] == (None, 65536)
    data_set(prefix, [[1, 2, 3], [4, 5, 6, 7, 8]])  # as many bytes: the index tells them apart
    with pytest.raises(ValueError, match=r"d_text_document.json is not the manifest of the files next to it.* delete"):
        examine(str(prefix))


def test_a_manifest_says_which_ids_there_are(tmp_path):
    """Preprocessing, shards and merges with and without duplicates; older manifests say a bound."""
    corpus = write(tmp_path / "c.jsonl", ["bcd", "a~", "bcd"])
    whole = preprocess([corpus], tmp_path / "whole").prefixes[0]
    assert read_manifest(whole)["ids"] == {"min": 97, "max": 126}
    assert examine(str(whole))[3:] == (Range(97, 126), 258)
    shards = [preprocess([corpus], tmp_path / "part", shard=(n, 4)).prefixes[0] for n in range(4)]
    assert None in [read_manifest(shard)["ids"] for shard in shards]  # one of them is empty
    for dedup in (False, True):
        merged = tmp_path / f"merged-{dedup}"
        Merge(MergeJob(tuple(map(str, shards)), merged, dedup=dedup)).run()
        assert read_manifest(merged)["ids"] == {"min": 97, "max": 126}
    said = read_manifest(whole)
    manifest_path(whole).write_text(json.dumps({**said, "ids": {"min": 97, "max": 125}}))
    faults = [check.fault for check in verify(whole) if check.fault]
    assert faults == ["it says 97 to 125, but they are 97 to 126"]
    del said["ids"]
    manifest_path(whole).write_text(json.dumps(said))
    assert examine(str(whole))[3:] == (None, 258)


def test_ids_of_every_integer_type_are_read_in_shares(tmp_path):
    for dtype, low, high in (
        (np.uint8, 3, 255),
        (np.uint16, 0, 65535),
        (np.int32, -7, 128_256),
        (np.int64, -1, 1 << 40),
    ):
        prefix = data_set(tmp_path / np.dtype(dtype).name, [[5, high, 6], [7, low]], dtype)
        assert read_index(prefix).dtype == dtype
        parts = [scan(bin_path(prefix), np.dtype(dtype), part, 3) for part in range(3)]
        assert parts == [Range(5, 5), Range(6, high) if high > 6 else None, Range(low, 7)]
        found = examine(str(prefix))
        assert (found.known, found.limit) == (None, int(high) + 1 if np.dtype(dtype).kind == "u" else None)
    assert Range(0, 257).fault(258) == ""
    assert Range(0, 257).fault(257) == "ids from 0 to 257, but the vocabulary has 257"
    assert Range(-1, 5).fault(257) == "ids from -1 to 5, but the vocabulary has 257"
