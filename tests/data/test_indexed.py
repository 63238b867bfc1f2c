"""The indexed format against Megatron's own builder and data sets."""

import io

import numpy as np
import pytest

from megatron_hybrid.data import indexed
from megatron_hybrid.data.indexed import IndexedWriter, Sizes, dtype_for, read_index, token_blocks, write_index
from megatron_hybrid.data.manifest import length_statistics
from megatron_hybrid.files import atomic_write

from .corpora import documents, files, preprocess, write


def test_atomic_write_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_same_bytes_as_upstream(tmp_path, monkeypatch, vocab_size, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "_BLOCK", 2)
    assert dtype_for(vocab_size) == dtype == DType.optimal_dtype(vocab_size)
    rng = np.random.default_rng(5)
    docs = [rng.integers(0, vocab_size, n) for n in (1, 7, 4096, 2, 333)]
    docs[0][0] = vocab_size - 1
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for doc in docs:
        builder.add_document(torch.tensor(doc), [len(doc)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path, "v1.5", np.dtype(dtype)) as writer:
        for part in (docs[:2], docs[2:]):
            writer.add(np.concatenate(part).astype(dtype), np.array([len(doc) for doc in part]))
        writer.finish()
    for ending in ("bin", "idx"):
        assert (tmp_path / f"v1.5.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = IndexedDataset(str(tmp_path / "v1.5"))
    assert [list(read[i]) for i in range(len(read))] == [list(doc) for doc in docs]
    index = read_index(tmp_path / "theirs")
    assert index.dtype == dtype and index.lengths.tolist() == [1, 7, 4096, 2, 333]
    assert index.documents.tolist() == [0, 1, 2, 3, 4, 5] and index.tokens == 4439


def test_a_later_writer_goes_on_where_the_earlier_was_noted(tmp_path):
    ids, lengths = np.arange(9, dtype=np.uint16), np.array([4, 5])
    with IndexedWriter(tmp_path, "a", ids.dtype) as writer:
        writer.add(ids, lengths)
        noted = writer.sync()
        writer.add(ids[:3], np.array([3]))
    assert noted == Sizes(2, 9)
    with IndexedWriter(tmp_path, "a", ids.dtype, noted) as writer:
        writer.add(ids[:2], np.array([2]))
        writer.finish()
    assert documents(tmp_path / "a") == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [0, 1]]
    with pytest.raises(ValueError, match="fewer than the 200 that were noted"):
        IndexedWriter(tmp_path, "a", ids.dtype, Sizes(3, 100))


def test_what_a_writer_refuses(tmp_path):
    with IndexedWriter(tmp_path, "a", np.dtype(np.uint16)) as writer:
        with pytest.raises(ValueError, match="4 tokens in all"):
            writer.add(np.arange(3, dtype=np.uint16), np.array([4]))
        with pytest.raises(ValueError, match="as uint16"):
            writer.add(np.arange(4), np.array([4]))
    with pytest.raises(ValueError, match="float32 of token ids: Megatron reads uint8, int8, int16"):
        IndexedWriter(tmp_path, "b", np.dtype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"x" + b[1:], "its header is wrong"),
        (lambda b: b[:20], "its header is wrong"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"x", "1 bytes too many"),
        (lambda b: b[:17] + b"\x06" + b[18:], "dtype code 6; known are version 1 and the codes of integers, 1 .uint8"),
    ],
)
def test_damaged_indexes_are_refused(tmp_path, damage, message):
    stream = io.BytesIO()
    write_index(stream, np.dtype(np.uint16), np.array([3, 4]))
    (tmp_path / "a.idx").write_bytes(damage(stream.getvalue()))
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "a")


def test_blocks_of_documents_cover_all_tokens():
    lengths = np.random.default_rng(0).integers(0, 300, 1000)
    lengths[17] = 5000
    blocks = list(token_blocks(lengths, most=1000))
    assert [d.start for d, _ in blocks[1:]] == [d.stop for d, _ in blocks[:-1]] and blocks[-1][0].stop == 1000
    assert all(t.stop - t.start == lengths[d].sum() for d, t in blocks)
    assert all(t.stop - t.start <= 1000 or d.stop - d.start == 1 for d, t in blocks)
    assert list(token_blocks(lengths[:0])) == []


def test_length_statistics():
    found = length_statistics(np.array([1, 1, 2, 3, 4, 127, 128, 65535, 65536], dtype=np.int32))
    assert found["histogram"] == {"1": 2, "2": 2, "4": 1, "64": 1, "128": 1, "32768": 1, "65536": 1}
    assert (found["min"], found["max"]) == (1, 65536) and found["mean"] == pytest.approx(131337 / 9)
    assert length_statistics(np.empty(0, np.int32)) == {"min": None, "max": None, "mean": None, "histogram": {}}


def test_gpt_dataset_reads_exactly_the_documents_in_order(tmp_path):
    """Upstream's own data set over one epoch: unshuffled, its samples are the documents one after the other."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    texts = [f"document {i} " + "x" * (i * 7 % 50) for i in range(60)]
    preprocess([write(tmp_path / "a.jsonl", texts)], tmp_path / "out", prepend_bos=True, append_eod=True)
    prefix = tmp_path / "out_text_document"
    expected = [i for text in texts for i in [256, *text.encode(), 257]]
    assert [i for document in documents(prefix) for i in document] == expected
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=NullTokenizer(258),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
        mid_level_dataset_surplus=0.005,
    )
    data = GPTDataset(
        IndexedDataset(str(prefix)), str(prefix), np.arange(60, dtype=np.int32), None, Split.train, config
    )
    order = data.document_index.tolist()
    assert sorted(order) == list(range(60)), "one epoch, shuffled by document"
    stream = [i for number in order for i in documents(prefix)[number]]
    position = {int(shuffled): place for place, shuffled in enumerate(data.shuffle_index)}
    for number in range(len(data)):
        sample = data[position[number]]
        assert sample["tokens"].tolist() == stream[32 * number : 32 * number + 32]
        assert sample["labels"].tolist() == stream[32 * number + 1 : 32 * number + 33]
    assert files(tmp_path)  # the corpus itself is untouched
