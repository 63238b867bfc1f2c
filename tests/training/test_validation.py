"""Evaluation with a batch of its own, and of whole validation sets, in runs of the program on every layout."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from tests.support.program import end
from tests.support.training import SIZES, folder, initial_checkpoint

EOD = 63
FLAGS = f"""{SIZES} --micro-batch-size 1 --global-batch-size 4 --train-iters 2 --lr 1e-3 --min-lr 1e-3 --num-workers 0
--lr-decay-style constant --tokenizer-type NullTokenizer --seed 7 --save-interval 100 --eval-interval 1
--use-distributed-optimizer --no-save-optim --no-save-rng"""
RTOL = 1e-5


def write(where: Path, name: str, documents: int, seed: int) -> str:
    """A data set of short documents of random tokens, each ended by EOD."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(where, name, dtype_for(64)) as writer:
        for length in draw.integers(5, 40, documents):
            writer.add(np.append(draw.integers(0, EOD, length - 1), EOD).astype(np.uint16), np.array([length]))
        writer.finish()
    return str(where / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("sets")
    return {
        name: write(where, name, documents, seed)
        for seed, (name, documents) in enumerate({"train": 400, "first": 19, "second": 33}.items())
    }


def validations(where: Path) -> dict[tuple[int, str], float]:
    """Iteration and name of each validation in a run's metrics to its loss."""
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    return {(r["iteration"], r["validation"]): r["validation_loss"] for r in records if "validation_loss" in r}


@pytest.fixture(scope="module")
def weights(ranks, tmp_path_factory) -> str:
    """A checkpoint that all runs start from: initial weights depend on the layout."""
    where = folder(tmp_path_factory.mktemp("weights"))
    ranks(1).run(initial_checkpoint, pattern="M-*-", folder=where)
    return where


def losses_of(ranks, tmp_path, size: int, flags: str, pattern: str = "M-*-") -> dict[tuple[int, str], float]:
    """Losses of the validations of a run."""
    where = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    line = f"{FLAGS} --save {where} --data-cache-path {tmp_path}/cache --hybrid-layer-pattern {pattern} {flags}"
    ended = ranks(size).run(end, argv=line.split())
    assert [code for _, code in ended] == [None] * size, ended[0][0][-2000:]
    return validations(where)


LAYOUTS = {
    "dp2": (2, "M-*-", ""),
    "tp2-sp": (2, "M-*-", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-vpp2": (2, "M|-|*|-", "--pipeline-model-parallel-size 2"),
    "cp2-packed": (2, "M-*-", "--context-parallel-size 2 --reset-attention-mask"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_of_every_set_is_read_once(ranks, tmp_path, data, weights, layout):
    """The whole sets' losses are those of one process that reads each set by itself, sample by sample."""
    size, pattern, flags = LAYOUTS[layout]
    packed = "--reset-attention-mask" if "packed" in layout else ""
    sets = f"--load {weights} --finetune --train-data-path {data['train']} --test-data-path {data['first']}"
    both = f"{sets} --valid-data-path {data['first']} {data['second']} --full-validation --multiple-validation-sets"
    found = losses_of(ranks, tmp_path, size, f"{both} {flags} --eval-micro-batch-size 2 --eval-iters 1", pattern)
    assert sorted(found) == sorted([(i, n) for i in (1, 2) for n in ("validation", "validation-1")] + [(2, "test")])
    for name, path in (("validation", data["first"]), ("validation-1", data["second"])):
        count = samples(path)
        assert count % 4, "a set that fills its last batch would not show what fills it up"
        alone = f"{sets} --valid-data-path {path} {packed} --eval-micro-batch-size 1 --eval-global-batch-size 1"
        # upstream's own evaluation; it draws one validation's samples in advance, so that this is one pass
        alone += f" --eval-iters {count} --eval-interval 2 --train-iters 1"
        expected = losses_of(ranks, tmp_path, 1, alone)
        assert found[1, name] == pytest.approx(expected[1, "validation"], rel=RTOL)
    assert found[2, "test"] == pytest.approx(found[2, "validation"], rel=RTOL)


def samples(path: str) -> int:
    from megatron_hybrid.data.indexed import read_index

    return (read_index(Path(path)).tokens - 1) // 32


def test_a_blend_of_whole_sets_has_no_weights(ranks, tmp_path, data):
    """Of --data-path with weights each source's validation part counts once, with as many tokens as it has."""
    flags = "--split 80,15,5 --full-validation"
    found = [
        losses_of(ranks, tmp_path, 1, f"{flags} --data-path {weights}")[1, "validation"]
        for weights in (f"3 {data['train']} 1 {data['second']}", f"1 {data['train']} 9 {data['second']}")
    ]
    assert found[0] != found[1]  # the first step's batch is drawn by the weights
    alone = f"--split 80,15,5 --full-validation --data-path {data['train']}"
    assert found[0] != losses_of(ranks, tmp_path, 1, alone)[1, "validation"]


@pytest.mark.parametrize(
    ("size", "flags"),
    [(2, "--tensor-model-parallel-size 2 --sequence-parallel"), (2, ""), (1, "--reset-attention-mask")],
    ids=["tp2-sp", "dp2", "packed"],
)
def test_evaluation_with_a_batch_of_its_own(ranks, tmp_path, data, size, flags):
    sets = f"--train-data-path {data['train']} --valid-data-path {data['second']} --eval-iters 2 {flags}"
    small = losses_of(ranks, tmp_path, size, sets)
    large = losses_of(ranks, tmp_path, size, f"{sets} --eval-micro-batch-size 2 --eval-global-batch-size 4")
    for key in small:
        assert large[key] == pytest.approx(small[key], rel=RTOL)


def test_an_evaluation_leaves_the_run_as_it_is(ranks, tmp_path, data):
    where = folder(tmp_path / "run")
    sets = f"--train-data-path {data['train']} --valid-data-path {data['second']} --eval-iters 1 --train-iters 6"
    line = (
        f"{FLAGS} {sets} --data-cache-path {tmp_path}/cache --hybrid-layer-pattern M-*- --save {where} --load {where}"
    )
    line = line.replace("--no-save-optim --no-save-rng", "")
    ranks(1).run(end, argv=f"{line} --exit-interval 2".split())
    (Path(where) / "latest_checkpointed_iteration.txt").write_text("7\n")  # and it is not mended either

    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(Path(where).rglob("*")) if p.is_file()}

    before = state()
    text, code = ranks(1).run(end, argv=f"{line} --skip-train".split())[0]
    assert code is None and "validation loss at iteration 2" in text
    assert state() == before
