"""The data of a run and its model: one verdict on all ranks, before the model is built."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_hybrid.data.indexed import IndexedWriter
from tests.data.corpora import train_bpe
from tests.training import data_cases as cases

TP2 = "--tensor-model-parallel-size 2 --split 1,0,0"
SMALL = "--vocab-size 100 --make-vocab-size-divisible-by 2"


def data_set(prefix: Path, top: int, dtype=np.uint16, documents: int = 60) -> Path:
    """A data set without a manifest, whose ids go up to ``top``, once, in its last document."""
    for end in (".bin", ".idx"):
        Path(f"{prefix}{end}").unlink(missing_ok=True)
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(dtype)) as writer:
        ids = np.random.default_rng(0).integers(0, 90, 40 * documents).astype(dtype)
        ids[-3] = top
        writer.add(ids, np.full(documents, 40))
        writer.finish()
    return prefix


def same(found: list) -> dict:
    """What all ranks have come to."""
    assert all(one == found[0] for one in found)
    return found[0]


def test_ids_without_a_row_are_refused_on_every_rank(ranks, tmp_path):
    prefix = data_set(tmp_path / "d", 257)
    for more in ("", "--skip-train"):  # the second time from what the first has noted
        said = same(ranks(2).run(cases.checked, flags=f"{TP2} {SMALL} --data-path {prefix} {more}"))["error"]
        assert said.startswith(f"{prefix} has token ids up to 257, but the model has 100 rows for them")
        assert "Give --vocab-size 258, or" in said and "\n" not in said
    noted = list((prefix / "cache/ContentGPTDataset_indices").glob("ids-*.json"))
    assert [json.loads(file.read_text()) for file in noted] == [[0, 257]]
    # as many as the rows that pad the vocabulary
    roomy = f"{TP2} --vocab-size 257 --make-vocab-size-divisible-by 2 --data-path {prefix}"
    found = same(ranks(2).run(cases.checked, flags=roomy))
    assert found["notes"] == [
        f"{prefix} has token ids up to 257, beyond the tokenizer's vocabulary of 257: they take rows that pad it to 260"
    ]
    # other data under the same name, by the same index; signed ids, of 8 bytes
    data_set(prefix, 99)
    assert same(ranks(2).run(cases.checked, flags=f"{TP2} {SMALL} --data-path {prefix}"))["notes"] == []
    data_set(prefix, -1, np.int64)
    said = same(ranks(2).run(cases.checked, flags=f"{TP2} {SMALL} --data-path {prefix}"))["error"]
    assert said.startswith(f"{prefix} has negative token ids (the least is -1)")


def test_a_tokenizer_whose_ids_have_gaps_takes_rows_for_the_largest(ranks, tmp_path):
    """Upstream would count the entries and pad their number."""
    texts = ["seven stones and a river " * 9] * 20
    folder = train_bpe(texts, 270, tmp_path / "hf")
    gap = json.loads((folder / "tokenizer.json").read_text())
    gap["model"]["vocab"] = {word: n if n < 100 else n + 1000 for word, n in gap["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(gap))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with IndexedWriter(tmp_path, "d", np.dtype(np.uint16)) as writer:  # as another tool writes them
        for text in texts:
            found = np.array(tokenizer.encode(text).ids, np.uint16)
            writer.add(found, np.array([len(found)]))
        writer.finish()

    flags = f"--split 1,0,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --data-path {tmp_path}/d"
    found = same(ranks(1).run(cases.checked, flags=flags))
    assert "error" not in found and found["rows"] > int(max(gap["model"]["vocab"].values()))


def test_all_ways_to_name_the_data_are_checked(ranks, tmp_path):
    good, bad = data_set(tmp_path / "good", 99), data_set(tmp_path / "bad", 257)
    listed, per_split = tmp_path / "list", tmp_path / "split.json"

    def said(flags: str) -> str:
        return same(ranks(1).run(cases.checked, flags=f"{SMALL} {flags}")).get("error", "")

    listed.write_text(f"0.5 {good}\n0.5 {bad}\n")
    assert said(f"--data-args-path {listed} --split 1,0,0").startswith(f"{bad} has token ids up to 257")
    assert "of which --split 969, 30, 1 leaves none for test" in said(f"--data-args-path {listed}")
    per_split.write_text(json.dumps({"train": [str(good)], "valid": None, "test": f"1 {bad}"}))
    assert said(f"--per-split-data-args-path {per_split}").startswith(f"{bad} has token ids up to 257")
    assert said(f"--train-data-path {good} --valid-data-path {bad}").startswith(f"{bad} has token ids up to 257")
    assert said(f"--train-data-path {good} --skip-train --valid-data-path {bad}").startswith(f"{bad} has token ids")
    assert said(f"--train-data-path {good}") == ""
    # what Megatron would end by a traceback, or pass over
    assert "--data-path and --train/valid/test-data-path each name the data" in said(
        f"--data-path {good} --train-data-path {good}"
    )
    assert "drop --split" in said(f"--split 1,0,0 --train-data-path {good}")
    assert "weight 0: weights are numbers above 0" in said(f"--data-path 0 {bad} 1 {good}")
    assert "has 1 where a data set stands" in said(f"--data-path 1 {good} more {good}")
    per_split.write_text(json.dumps({"train": [str(good)]}))
    assert "is not a JSON object with train, valid and test" in said(f"--per-split-data-args-path {per_split}")
    Path(f"{good}.bin").write_bytes(b"\0" * 10)
    assert f"{good}.bin has 10 bytes" in said(f"--data-path {good} --split 1,0,0")


@pytest.mark.parametrize("asked", ["", "--data-cache-path"])
def test_where_the_data_cannot_be_written_the_order_is_kept_elsewhere(ranks, tmp_path, asked):
    prefix = data_set(tmp_path / "d", 99)
    prefix.write_text("a file stands where upstream makes its folder")  # root may write whatever the modes say
    flags = f"{TP2} {SMALL} --data-path {prefix} --save {tmp_path}/run --save-interval 9"
    if asked:
        said = same(ranks(2).run(cases.checked, flags=f"{flags} {asked} {prefix}/cache"))["error"]
        assert said.startswith(f"--data-cache-path {prefix}/cache cannot be written (Not a directory)")
        return
    found = ranks(2).run(cases.train_set, flags=flags)
    assert [one.pop("documents") for one in found] == [60, None]  # the first of both ranks draws
    assert same(found)["cache"] == f"{tmp_path}/run/index_cache"
    assert same(found)["notes"] == [
        f"the order of the documents is kept in {tmp_path}/run/index_cache: beside the data is no place "
        f"({prefix}/cache/ContentGPTDataset_indices: Not a directory)"
    ]
    data_set(prefix, 99, documents=200)  # made anew
    assert [one["documents"] for one in ranks(2).run(cases.train_set, flags=flags)] == [200, None]
    assert os.listdir(tmp_path / "run") == ["index_cache"]


def test_a_run_that_goes_on_with_other_data_says_so(ranks, tmp_path):
    prefix, run = data_set(tmp_path / "d", 99), tmp_path / "run"
    flags = f"{SMALL} --split 1,0,0 --data-path {prefix} --save {run} --load {run} --save-interval 9"
    printed = ranks(1).run(cases.trained, flags=flags)[0]
    assert f"--load {run} has no checkpoint: the run starts from fresh weights" in printed
    assert ranks(1).run(cases.checked, flags=flags)[0]["notes"] == []
    data_set(prefix, 99, documents=70)
    assert ranks(1).run(cases.checked, flags=flags)[0]["notes"] == [
        f"{prefix} has another content than when {run}/iter_0000001 was saved: the order of its documents is a new one"
    ]
