"""What the inspector shows of a data set, and that it finds damage wherever it lies."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.indexed import IndexedWriter, bin_path, idx_path, read_index
from megatron_hybrid.data.inspection import (
    draw_histogram,
    histogram,
    order_statistics,
    parse_numbers,
    read_whole_index,
    show_documents,
    statistics,
    table,
    tokenizer_of,
)
from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.tokenizers import TokenizerSpec
from megatron_hybrid.data.verify import verify, verify_inputs
from tests.support import processes

from .corpora import BYTES, preprocess, train_bpe, write

tool = functools.partial(processes.tool, "inspect_dataset")
TEXTS = [f"document {i} " + "äöü " * (i % 9) for i in range(50)]


def made(folder: Path, name: str = "x", texts=TEXTS, **flags) -> Path:
    """A data set of bytes with BOS and EOD."""
    flags = {"append_eod": True, "prepend_bos": True} | flags
    return preprocess([write(folder / f"{name}.jsonl", texts)], folder / name, **flags).prefixes[0]


def foreign(prefix: Path, lengths, documents=None, ids=None) -> Path:
    """A data set of another tool: no manifest."""
    ids = np.arange(sum(lengths)) % 1000 if ids is None else np.array(ids)
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(np.int32)) as writer:
        writer.add(ids.astype(np.int32), np.array(lengths, dtype=np.int64))
        writer.finish(None if documents is None else np.array(documents))
    return prefix


def faults(prefix: Path) -> dict[str, str]:
    return {name: fault for name, fault, _ in verify(prefix) if fault}


# --- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("greatest", [1, 1 << 16, (1 << 16) - 1, 1 << 20, 1 << 40])
def test_order_statistics_are_exact(greatest):
    values = np.random.default_rng(0).integers(0, greatest, 1001)
    values[:5] = greatest
    ranks = [0, 17, 500, 950, 1000]
    found = order_statistics(lambda: np.array_split(values, 7), ranks)
    assert found == np.sort(values)[ranks].tolist()


def test_figures(tmp_path):
    prefix = made(tmp_path)
    lengths = np.array([len(text.encode()) + 2 for text in TEXTS])
    figures = statistics(prefix)
    assert figures["documents"] == figures["sequences"] == 50
    assert figures["tokens"] == lengths.sum() and figures["text_tokens"] == lengths.sum() - 100
    assert figures["lengths"] == {
        "min": lengths.min(),
        "median": np.percentile(lengths, 50, method="inverted_cdf"),
        "mean": lengths.mean(),
        "p95": np.percentile(lengths, 95, method="inverted_cdf"),
        "max": lengths.max(),
    }
    assert figures["bytes_per_token"] == 1.0 and figures["text_bytes"] == lengths.sum() - 100
    assert figures["bin_bytes"] == 2 * lengths.sum()
    assert sum(counts["documents"] for counts in figures["histogram"].values()) == 50
    assert sum(counts["tokens"] for counts in figures["histogram"].values()) == lengths.sum()
    lines = table(figures).splitlines()
    column = lines[0].index("50")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)  # aligned
    assert "BOS 256 at the start, EOD 257" in table(figures)


def test_histogram_bins():
    found = histogram([np.array([0, 1, 2, 3]), np.array([4, 7, 8, 2**31])])
    assert found == {
        "0": {"documents": 1, "tokens": 0},
        "1": {"documents": 1, "tokens": 1},
        "2": {"documents": 2, "tokens": 5},
        "4": {"documents": 2, "tokens": 11},
        "8": {"documents": 1, "tokens": 8},
        str(2**31): {"documents": 1, "tokens": 2**31},
    }


def test_documents_of_several_sequences(tmp_path):
    prefix = foreign(tmp_path / "s", [3, 1, 4, 1, 5], [0, 2, 2, 5])
    figures = statistics(prefix)
    assert (figures["documents"], figures["sequences"], figures["tokens"]) == (3, 5, 14)
    assert figures["lengths"] == {"min": 0, "median": 4, "mean": 14 / 3, "p95": 10, "max": 10}
    assert figures["tokenizer"] is None and "manifest" in table(figures) and "bytes per token" not in table(figures)
    shown = list(show_documents(prefix, read_index(prefix), [2, 1, 0], None, 0))
    assert shown == [
        "--- document 2: 10 tokens in 3 sequences\n4 5 6 7 8 9 10 11 12 13",
        "--- document 1: 0 tokens in 0 sequences\n",
        "--- document 0: 4 tokens in 2 sequences\n0 1 2 3",
    ]
    assert not faults(prefix)


def test_an_empty_shard(tmp_path):
    path = write(tmp_path / "a.jsonl", ["one"])
    prefix = preprocess([path], tmp_path / "x", shard=(1, 2)).prefixes[0]
    figures = statistics(prefix)
    assert figures["documents"] == 0 and figures["lengths"]["max"] is None and "1/2" in table(figures)
    assert not faults(prefix)
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_histogram(figures, tmp_path / "x.png")
    with pytest.raises(ValueError, match="there are 0 documents"):
        parse_numbers(["0"], 0)


def test_figures_of_a_damaged_index_are_refused(tmp_path):
    prefix = made(tmp_path)
    with bin_path(prefix).open("ab") as stream:
        stream.write(b"12")
    with pytest.raises(ValueError, match="--verify"):
        statistics(prefix)


# --- documents -------------------------------------------------------------------------------------


def test_numbers_and_ranges():
    assert parse_numbers(["0", "5", "-1"], 10) == [0, 5, 9]
    assert parse_numbers(["3:6", "-2:", ":1", "8:99"], 10) == [3, 4, 5, 8, 9, 0, 8, 9]
    for wrong in ("10", "-11", "x", "3:x", "6:3", "12:20", "", "1.5", "1:2:3"):
        with pytest.raises(ValueError, match=f"--documents {wrong}: there are 10"):
            parse_numbers([wrong], 10)


def test_documents_are_shown_as_text(tmp_path):
    prefix = made(tmp_path)
    tokenizer = tokenizer_of(read_manifest(prefix), None)
    index = read_whole_index(prefix)
    shown = list(show_documents(prefix, index, [3, 49], tokenizer, 0))
    assert shown[0] == f"--- document 3: {len(TEXTS[3].encode()) + 2} tokens\n<s>{TEXTS[3]}</s>"
    assert TEXTS[49] in shown[1]
    (cut,) = show_documents(prefix, index, [3], tokenizer, 10)
    assert cut.endswith(f", the first 10 of {len(TEXTS[3]) + 7} characters\n<s>documen")


def test_another_tokenizer_is_refused(tmp_path):
    spec = TokenizerSpec("HuggingFaceTokenizer", train_bpe(TEXTS, 270, tmp_path / "bpe"))
    prefix = made(tmp_path, tokenizer=spec, prepend_bos=False)
    said = read_manifest(prefix)
    text = next(show_documents(prefix, read_index(prefix), [7], tokenizer_of(said, None), 0))
    assert TEXTS[7] in text
    assert tokenizer_of(said, spec).fingerprint == said["tokenizer"]["fingerprint"]
    with pytest.raises(ValueError, match="not the one that made the data"):
        tokenizer_of(said, BYTES)
    (tmp_path / "bpe").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not there"):
        tokenizer_of(said, None)
    assert tokenizer_of(said, TokenizerSpec("HuggingFaceTokenizer", tmp_path / "elsewhere"))


def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path):
    prefix = foreign(tmp_path / "f", [5], ids=[1, 2, 3, 4, 300])
    with pytest.raises(ValueError, match="ids 1 to 300, but the tokenizer's vocabulary is 258"):
        list(show_documents(prefix, read_index(prefix), [0], tokenizer_of(None, BYTES), 0))
    with pytest.raises(ValueError, match="no manifest names a tokenizer"):
        tokenizer_of(None, None)


# --- verify ----------------------------------------------------------------------------------------


def test_whole_data_sets_have_no_fault(tmp_path):
    for prefix in (made(tmp_path), made(tmp_path, "d", [*TEXTS, *TEXTS], dedup=True), foreign(tmp_path / "f", [3, 4])):
        checks = list(verify(prefix))
        assert len(checks) >= 6 and not faults(prefix)
    assert any("EOD 257 ends each" in name for name, _, _ in verify(made(tmp_path, "again")))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_any_flipped_bit_is_found(tmp_path):
    prefix = made(tmp_path)
    for path in (bin_path(prefix), idx_path(prefix)):
        size = path.stat().st_size
        # All of the header and the ends, and every 97th byte between: every field of the index is among them.
        for at in sorted({*range(min(34, size)), *range(0, size, 97), *range(size - 9, size)}):
            flip(path, at)
            assert faults(prefix), (path, at)
            flip(path, at)
    assert not faults(prefix)


def test_damage_is_named(tmp_path):
    prefix = made(tmp_path)
    index = read_index(prefix)
    count, at = len(index.lengths), 34
    cases = [
        (idx_path(prefix), 0, "index: header and size", "its header is wrong"),
        (idx_path(prefix), at + 4 * 7, "index: offsets are the sums of lengths", "sequence 8 is said to begin"),
        (idx_path(prefix), at + 4 * count + 8 * 9, "index: offsets are the sums of lengths", "sequence 9 is said"),
        (idx_path(prefix), at + 12 * count, "index: documents", "the first document begins at sequence 1"),
        (idx_path(prefix), at + 12 * count + 8 * count, "index: documents", f"ends at sequence {count ^ 1}"),
        (bin_path(prefix), 0, "data: BOS 256 starts each document", "1 of 50 documents are without: 0"),
        (bin_path(prefix), int(index.offsets[8]) - 2, "data: EOD 257 ends each document", "are without: 7"),
        (bin_path(prefix), int(index.offsets[8]) + 3, "data: ids are in the vocabulary", "has 258"),
    ]
    del index
    for path, place, name, text in cases:
        flip(path, place)
        found = faults(prefix)
        assert text in found.get(name, ""), (found, name)
        kind = "bin" if path == bin_path(prefix) else "idx"
        assert f"manifest: checksum of .{kind}" in found
        flip(path, place)


def test_truncated_missing_and_swapped_files_are_found(tmp_path):
    a, b = made(tmp_path, "a"), made(tmp_path, "b", [text.swapcase() for text in TEXTS])
    swapped = bin_path(a).read_bytes(), bin_path(b).read_bytes()
    bin_path(a).write_bytes(swapped[1])
    assert set(faults(a)) == {"manifest: checksum of .bin"}
    bin_path(a).write_bytes(swapped[0][:-2])
    assert {"data: size", "manifest: checksum of .bin"} <= set(faults(a))
    bin_path(a).unlink()
    assert "data: size" in faults(a)
    bin_path(a).write_bytes(swapped[0])
    index = idx_path(a).read_bytes()
    idx_path(a).write_bytes(index[:-1])
    assert "truncated" in faults(a)["index: header and size"]
    idx_path(a).unlink()
    assert "there is no" in faults(a)["index: header and size"]
    # An index of other documents with as many tokens in all.
    other = made(tmp_path, "o", TEXTS[::-1])
    idx_path(a).write_bytes(idx_path(other).read_bytes())
    found = faults(a)
    assert {"data: EOD 257 ends each document", "manifest: checksum of .idx"} <= set(found)
    bin_path(a).unlink()
    idx_path(a).unlink()
    with pytest.raises(ValueError, match="give the prefix"):
        list(verify(a))


def test_a_manifest_that_lies_is_found(tmp_path):
    prefix = made(tmp_path)
    path = manifest_path(prefix)
    said = json.loads(path.read_text())
    for name, value in (
        ("documents", 51),
        ("tokens", 1),
        ("dtype", "int32"),
        ("duplicates", 3),
        ("lengths", said["lengths"] | {"max": 9}),
        ("bin", said["bin"] | {"size": 0}),
    ):
        path.write_text(json.dumps(said | {name: value}))
        assert set(faults(prefix)) == {"manifest: documents, tokens, sizes, lengths"}, name
    path.write_text(json.dumps(said | {"tokenizer": said["tokenizer"] | {"vocab_size": 257}}))
    assert faults(prefix) == {"data: ids are in the vocabulary": "ids from 32 to 257, but the vocabulary has 257"}
    path.write_text("{")
    assert "not valid JSON" in faults(prefix)["manifest"]


def test_negative_ids_and_documents_without_tokens(tmp_path):
    prefix = foreign(tmp_path / "f", [3, 2], ids=[1, -1, 3, 4, 5])
    assert "-1 to 5" in faults(prefix)["data: ids are not negative"]
    entry = {"vocab_size": 10, "bos_id": 1, "eod_id": 3, "prepend_bos": True, "append_eod": True}
    prefix = foreign(tmp_path / "g", [3, 0, 2], ids=[1, 2, 3, 1, 3])
    manifest_path(prefix).write_text(json.dumps({"format": 1, "tokenizer": entry}))
    found = faults(prefix)
    assert "1 of 3 documents are without: 1" in found["data: BOS 1 starts each document"]
    assert "1 of 3 documents are without: 1" in found["data: EOD 3 ends each document"]


def test_inputs_are_compared(tmp_path):
    corpus = [write(tmp_path / name, TEXTS) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]
    run = preprocess(corpus, tmp_path / "x", text_split="line")
    parts = [preprocess(corpus, tmp_path / "x", text_split="line", shard=(i, 3)).prefixes[0] for i in range(3)]
    for prefix in (*run.prefixes, *parts):
        found = list(verify_inputs(read_manifest(prefix)))
        assert found and {state for _, state in found} == {"ok"}
    flip(corpus[0], 1)
    corpus[1].unlink()
    corpus[3].write_bytes(corpus[3].read_bytes() + b"x")
    said = read_manifest(run.prefixes[0])
    assert [state for _, state in verify_inputs(said)] == ["changed", "gone", "ok", "changed"]
    # Of a file that was cut, only the shards that read the changed part.
    states = [dict(verify_inputs(read_manifest(part))) for part in parts]
    of_a = [state for found in states for name, state in found.items() if "a.jsonl" in name]
    assert of_a[0] == "changed" and set(of_a[1:]) <= {"ok"}


# --- the tool --------------------------------------------------------------------------------------


def test_tool(tmp_path):
    prefix = made(tmp_path)
    done = tool(f"{prefix}.bin", "--documents", "0", "-1", "2:4", "--max-chars", "5")
    assert done.returncode == 0 and [line for line in done.stdout.splitlines() if line.startswith("---")] == [
        f"--- document {i}: {len(TEXTS[i].encode()) + 2} tokens, the first 5 of {len(TEXTS[i]) + 7} characters"
        for i in (0, 49, 2, 3)
    ]
    done = tool(prefix, "--json", "--histogram", tmp_path / "x.png")
    figures = json.loads(done.stdout)
    assert figures["documents"] == 50 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert figures == statistics(prefix)
    done = tool(prefix, "--verify", "--verify-inputs")
    assert done.returncode == 0 and done.stdout.count(" ok") == 11 and "ok       " in done.stdout
    flip(bin_path(prefix), 20)
    done = tool(prefix, "--verify")
    assert done.returncode == 1 and "FAILED" in done.stdout and "1 check failed" in done.stderr
    done = tool(prefix, "--documents", "50")
    assert done.returncode == 2 and done.stderr.startswith("error: --documents 50: there are 50 documents")
