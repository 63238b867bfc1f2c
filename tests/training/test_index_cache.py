"""Megatron's cache of the order of documents: never that of other data, always that of upstream."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.indexed import IndexedWriter


def data_set(prefix: Path, lengths: list[int], first: int = 1) -> None:
    """Documents of one id each, ``first``, ``first + 1`` and so on; in place of what is there."""
    for end in (".bin", ".idx"):
        Path(f"{prefix}{end}").unlink(missing_ok=True)
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(np.uint16)) as writer:
        writer.add(np.repeat(np.arange(first, first + len(lengths)), lengths).astype(np.uint16), np.array(lengths))
        writer.finish()
    prefix.with_name(prefix.name + ".lengths").unlink()


class Tokenizer:
    """All that upstream's data sets ask of a tokenizer."""

    eod, pad, pad_id, vocab_size = 1999, -1, -1, 2000
    unique_identifiers = {"class": "test"}


@pytest.fixture(scope="module")
def build():
    """``build(words, cache, ours)``: the training set of 60 samples of 16 tokens, three epochs of a small data set."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import get_blend_from_list

    from megatron_hybrid.training.gpt_dataset import ContentGPTDataset, ContentGPTDatasetConfig

    def of(words: list[str], cache: Path | None, ours: bool = True, built: bool = False):
        config = ContentGPTDatasetConfig(
            random_seed=1,
            sequence_length=16,
            blend=get_blend_from_list(words),
            split="1,0,0",
            path_to_cache=str(cache) if cache else None,
            defer_npy_index_mmap=built,
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        kind = ContentGPTDataset if ours else GPTDataset
        return BlendedMegatronDatasetBuilder(kind, [60, 0, 0], lambda: True, config).build()[0]

    return of


def tokens(data) -> list[list[int]]:
    return [data[number]["tokens"].tolist() for number in range(60)]


def test_the_order_is_upstreams_and_that_of_the_data_that_are_there(build, tmp_path):
    prefix = tmp_path / "d"
    for step, lengths in enumerate([[9] * 40, [7, 11] * 20, [11, 7] * 20, [9] * 400, [9] * 10]):
        data_set(prefix, lengths)
        found = build([str(prefix)], tmp_path / "cache")
        fresh = build([str(prefix)], tmp_path / f"upstream{step}", ours=False)
        for name in ("document_index", "sample_index", "shuffle_index"):
            assert np.array_equal(getattr(found, name), getattr(fresh, name)), (lengths, name)
        assert tokens(found) == tokens(fresh)
    whole = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(whole) == 5 * 4  # and no folder that upstream wrote into
    # shuffled in place: the same sizes and other documents
    data_set(prefix, [9] * 10, first=700)
    assert {token for sample in tokens(build([str(prefix)], tmp_path / "cache")) for token in sample} == set(
        range(700, 710)
    )
    # and what is there is used, beside the data too
    for cache, folder in ((tmp_path / "cache", tmp_path / "cache"), (None, prefix / "cache/ContentGPTDataset_indices")):
        build([str(prefix)], cache)
        times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        build([str(prefix)], cache)
        assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_blend_is_drawn_anew_when_one_of_its_sources_changes(build, tmp_path):
    words = ["2", str(tmp_path / "a"), "1", str(tmp_path / "b")]
    data_set(tmp_path / "a", [9] * 100)
    for documents in (100, 400, 10):
        data_set(tmp_path / "b", [9] * documents, first=1000)
        found = build(words, tmp_path / "cache")
        assert tokens(found) == tokens(build(words, tmp_path / f"upstream{documents}", ours=False))
    assert len(list((tmp_path / "cache").glob("*-BlendedDataset-train-dataset_index.npy"))) == 3


def test_an_order_that_was_to_be_built_before_is_that_of_the_data_that_are_there(build, tmp_path):
    data_set(tmp_path / "d", [9] * 40)
    fresh = build([str(tmp_path / "d")], tmp_path / "cache")
    assert tokens(build([str(tmp_path / "d")], tmp_path / "cache", built=True)) == tokens(fresh)
    data_set(tmp_path / "d", [9] * 50)
    with pytest.raises(ValueError, match="has none of .*/d as it is now .* start it once without these flags"):
        build([str(tmp_path / "d")], tmp_path / "cache", built=True)


def test_a_run_that_is_killed_while_it_writes_leaves_no_partial_cache(build, tmp_path, monkeypatch):
    data_set(tmp_path / "d", [9] * 40)
    save = np.save

    def partial(file, array, **kwargs):
        save(file, array, **kwargs)
        if "shuffle_index" in file:
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", partial)
    with pytest.raises(KeyboardInterrupt):
        build([str(tmp_path / "d")], tmp_path / "cache")
    monkeypatch.undo()
    assert len(tokens(build([str(tmp_path / "d")], tmp_path / "cache"))) == 60
