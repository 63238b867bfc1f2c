"""Which files a corpus has, how they are read in batches, and how they are cut into shards."""

import gzip
import io
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.data import batches, parquet
from megatron_hybrid.data.batches import read_batches, shard
from megatron_hybrid.data.documents import read_texts
from megatron_hybrid.data.sources import Position, find_sources

from .corpora import lines, write

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt")


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of 500 bytes, so that small corpora have many."""
    for module in (batches, parquet):
        monkeypatch.setattr(module, "BATCH_BYTES", 500)
    monkeypatch.setattr(batches, "_COMPRESSED_BYTES", 130)
    monkeypatch.setattr(parquet, "_ROWS", 3)


def texts(count, seed=0, most=300):
    rng = random.Random(seed)
    words = ["one", "two", "naïve", "漢字", "🙂", "x" * 90, "\u2028", "\t"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(most // 9))) for i in range(count)]


def read(inputs, at=batches.BEGINNING, **how):
    return list(read_batches(shard(find_sources(map(str, inputs))[0], 0, 1), ["text"], how.get("split", "file"), at))


# --- which files -----------------------------------------------------------------------------------


def test_folders_and_globs_are_sorted_and_arguments_are_not(tmp_path):
    for name in ("b/2.jsonl", "b/10.jsonl", "b/sub/1.jsonl.gz", "a.json", "c.parquet", "d.txt.zst"):
        write(tmp_path / name, ["x"]) if name != "c.parquet" else write(tmp_path / name, ["x"])
    (tmp_path / "b" / "readme.pdf").write_bytes(b"")
    (tmp_path / "b" / ".hidden.jsonl").write_bytes(b"")
    found, passed_over = find_sources([f"{tmp_path}/[cd].*", str(tmp_path / "b"), str(tmp_path / "a.json")])
    assert [source.path.removeprefix(f"{tmp_path}/") for source in found] == [
        *("c.parquet", "d.txt.zst", "b/10.jsonl", "b/2.jsonl", "b/sub/1.jsonl.gz", "a.json")
    ]
    assert [(s.format, s.compression) for s in found[:2]] == [("parquet", ""), ("text", "zstd")]
    assert passed_over == [str(tmp_path / "b" / "readme.pdf")]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["none.jsonl"], "input none.jsonl does not exist"),
        (["none*.jsonl"], "matches no file"),
        (["a.bin"], "a.bin: unknown extension; give --input-format"),
        (["a.jsonl", "*.jsonl"], "a.jsonl is listed twice"),
        (["empty"], "no input file in empty"),
        (["a.parquet.gz"], "decompress this one first"),
    ],
)
def test_inputs_that_are_refused(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "a.jsonl", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        find_sources(inputs)
    assert message in str(error.value)


def test_links_are_followed_and_hidden_folders_are_not(tmp_path):
    write(tmp_path / "real" / "a.jsonl", ["a"])
    write(tmp_path / "in" / ".cache" / "b.jsonl", ["b"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "in" / "sub" / "c.jsonl", ["c"])
    for inputs in ([f"{tmp_path}/in"], [f"{tmp_path}/in/*"]):
        found, _ = find_sources(inputs)
        assert [Path(source.path).name for source in found] == ["a.jsonl", "c.jsonl"]
    with pytest.raises(ValueError, match="listed twice"):
        find_sources([f"{tmp_path}/in", f"{tmp_path}/real/a.jsonl"])
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a link to nothing"):
        find_sources([f"{tmp_path}/in"])
    (tmp_path / "in" / "gone.jsonl").unlink()
    (tmp_path / "in" / "sub" / "circle").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="leads back to a folder"):
        find_sources([f"{tmp_path}/in"])


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="a pipe or a device; give -"):
        find_sources([str(tmp_path / "pipe.jsonl")])


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet"])
def test_what_compresses_well_is_read_in_small_parts(tmp_path, kind):
    import zstandard

    texts_ = ["the same text " * 500] * 8000
    path = write(tmp_path / f"a.{kind}", texts_)
    if kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines(texts_)))
    assert path.stat().st_size < 300_000
    found = read([path])
    assert sum(batch.size for batch in found) > 50_000_000 and max(batch.size for batch in found) < 8 << 20


def test_a_format_can_be_said(tmp_path):
    (tmp_path / "data.dat").write_bytes(lines(["x"]))
    found, _ = find_sources([str(tmp_path)], "jsonl")
    assert list(read_texts(shard(found, 0, 1), "text")) == ["x"]


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_corpus_and_can_be_entered_anywhere(tmp_path, small_batches, kind):
    corpus = [text.replace("\t", " ") for text in texts(80)]
    inputs = [write(tmp_path / f"{i}.{kind}", corpus[40 * i : 40 * i + 40]) for i in range(2)]
    split = "line"
    assert list(read_texts(shard(find_sources(map(str, inputs))[0], 0, 1), "text", split)) == corpus
    whole = read(inputs, split=split)
    assert len(whole) > 10 and sum(batch.read_bytes for batch in whole) >= sum(f.stat().st_size for f in inputs) * 0.9
    for number, batch in enumerate(whole):
        rest = read(inputs, batch.end, split=split)
        joined = [b.content for b in rest if b.content]
        expected = [b.content for b in whole[number + 1 :] if b.content]
        if kind == "parquet":
            assert [v for c in joined for v in c[0]] == [v for c in expected for v in c[0]]
        else:
            assert b"".join(joined) == b"".join(expected)
        assert [b.checksum for b in rest if b.checksum] == [b.checksum for b in whole[number + 1 :] if b.checksum]


def test_a_checksum_is_the_standard_tools(tmp_path):
    import xxhash

    path = write(tmp_path / "a.jsonl.gz", texts(5))
    assert read([path])[-1].checksum == "xxh3_128:" + xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_a_line_longer_than_any_batch_stays_whole(tmp_path, small_batches):
    corpus = ["short", "l" * 10_000, "short again"]
    path = write(tmp_path / "a.jsonl", corpus)
    assert list(read_texts(shard(find_sources([str(path)])[0], 0, 1), "text")) == corpus


def test_text_files_are_documents(tmp_path):
    for name, content in (("a.txt", b"\xef\xbb\xbfone\ntwo\n"), ("b.md", b"three"), ("c.txt", b" \n")):
        (tmp_path / name).write_bytes(content)
    found = shard(find_sources([str(tmp_path)])[0], 0, 1)
    assert list(read_texts(found, "text")) == ["one\ntwo\n", "three"]
    assert list(read_texts(found, "text", "line")) == ["one", "two", "three"]


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b"}')
    assert list(read_texts(shard(find_sources([str(path)])[0], 0, 1), "text")) == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_all_that_a_truncated_file_holds_is_read(tmp_path, small_batches, kind):
    corpus = texts(200, most=100)
    whole = write(tmp_path / f"a.{kind}", corpus).read_bytes()
    counts = []
    for cut in range(1, len(whole), max(1, len(whole) // 40)):
        (tmp_path / f"cut.{kind}").write_bytes(whole[:cut])
        found = read([tmp_path / f"cut.{kind}"])
        assert "truncated" in found[-1].error and found[-1].end == Position(1, 0, 0)
        content = b"".join(batch.content for batch in found)
        assert lines(corpus).startswith(content) and content[-1:] in (b"", b"\n")
        counts.append(content.count(b"\n"))
    assert counts == sorted(counts) and counts[-1] > 100, "a later cut loses less"


def test_damage_in_the_middle_is_an_error_after_what_came_before(tmp_path, small_batches):
    rng = random.Random(1)
    corpus = ["".join(rng.choices("abcdefghij", k=200)) for _ in range(400)]
    content = bytearray(gzip.compress(lines(corpus)))
    content[len(content) // 2] ^= 0xFF
    content[len(content) // 2 + 1 :] = rng.randbytes(500)
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    found = read([tmp_path / "a.jsonl.gz"])
    assert found[-1].error and found[-1].first > 50, found[-1].error


def test_zeros_behind_gzip_are_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(["x"])) + bytes(512))
    assert [batch.error for batch in read([path])] == ["", ""]


def test_a_file_that_grows_meanwhile_is_noticed(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(10))
    sources, _ = find_sources([str(path)])
    with path.open("ab") as stream:
        stream.write(lines(["more"]))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(read_batches(shard(sources, 0, 1), ["text"]))


def test_standard_input(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(lines(["a", "b"]))

    monkeypatch.setattr("sys.stdin", Stdin)
    sources, _ = find_sources(["-"])
    assert list(read_texts(shard(sources, 0, 1), "text")) == ["a", "b"]
    with pytest.raises(ValueError, match="standard input cannot be divided"):
        shard(sources, 0, 2)


# --- Parquet ---------------------------------------------------------------------------------------


def test_parquet_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.array([{"text": "n0", "other": 1}, {"text": "n1", "other": 2}])
    columns = {
        "text": pa.array(["a", "b"]),
        "large": pa.array(["a", "b"], pa.large_string()),
        "binary": pa.array([b"a", b"b"]),
        "words": pa.array(["a", "b"]).dictionary_encode(),
        "meta": struct,
        "number": pa.array([1, 2]),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    found = shard(find_sources([str(path)])[0], 0, 1)
    for key in ("text", "large", "binary", "words"):
        assert list(read_texts(found, key)) == ["a", "b"], key
    assert list(read_texts(found, "meta.text")) == ["n0", "n1"]
    for key, message in (("none", r'no column "none" \(the file has: text, large'), ("number", "has the type int64")):
        with pytest.raises(ValueError, match=message):
            list(read_texts(found, key))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(read_texts(shard(find_sources([str(tmp_path / "b.parquet")])[0], 0, 1), "text"))


def test_parquet_faults_name_the_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"good", b"\xff", b"good"])}), path)
    found = shard(find_sources([str(path)])[0], 0, 1)
    with pytest.raises(ValueError, match=r"a.parquet, row 2: not valid UTF-8"):
        list(read_texts(found, "text"))
    pq.write_table(pa.table({"text": ["good", "good", None]}), path)
    with pytest.raises(ValueError, match=r'row 3: the column "text" is null'):
        list(read_texts(shard(find_sources([str(path)])[0], 0, 1), "text"))


# --- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_shards_are_the_corpus_in_order(tmp_path, count):
    corpus = texts(60)
    parts = [corpus[i * 12 : i * 12 + 12] for i in range(5)]
    inputs = [write(tmp_path / f"{i}.{kind}", part) for i, (kind, part) in enumerate(zip(KINDS, parts, strict=True))]
    sources, _ = find_sources(map(str, inputs))
    found = [list(read_texts(shard(sources, i, count, "line"), "text", "line")) for i in range(count)]
    assert sum(found, []) == corpus
    if count == 7:
        assert sum(bool(part) for part in found) >= 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 9), st.booleans())
def test_shards_cut_any_file_between_lines(tmp_path_factory, lengths, count, ended):
    path = tmp_path_factory.mktemp("shard") / "a.txt"
    content = "\n".join("x" * length for length in lengths) + ("\n" if ended else "")
    path.write_text(content)
    sources, _ = find_sources([str(path)])
    found = [
        b"".join(b.content for b in read_batches(shard(sources, i, count, "line"), ["text"], "line"))
        for i in range(count)
    ]
    assert b"".join(found) == content.encode()
    assert all(part.endswith(b"\n") for part in found[:-1] if part and any(found[found.index(part) + 1 :]))


def test_line_numbers_in_a_shard_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([f"text {i:04}" for i in range(100)]) + b"bad\n" + lines(["good"] * 20))
    sources, _ = find_sources([str(path)])
    with pytest.raises(ValueError, match=r"a.jsonl:101: not valid JSON"):
        list(read_texts(shard(sources, 3, 4), "text"))
