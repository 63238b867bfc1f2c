"""What a run saves, in the foreground and in the background: whole, sealed, the right ones kept; how it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.run_folder.checkpoints import POINTER, checkpoints, point_to, problems
from megatron_hybrid.run_folder.metrics_file import read_metrics
from megatron_hybrid.run_folder.state import read_state
from tests.support.program import end
from tests.support.training import MOE, SIZES, folder

PATTERN = "MEP-*-"
FLAGS = f"""{SIZES} {MOE} --hybrid-layer-pattern {PATTERN} --micro-batch-size 1 --global-batch-size 4 --lr 1e-2
--min-lr 1e-3 --lr-decay-style cosine --tokenizer-type NullTokenizer --mock-data --seed 7 --log-interval 1
--eval-interval 100 --eval-iters 1 --num-workers 0 --dist-ckpt-optim-fully-reshardable --hidden-dropout 0.1
--train-iters 9 --save-interval 2"""
RANKS = 2


def run(ranks: Any, where: Path, more: str = "") -> list[tuple[str, Any]]:
    """What each rank said, and its exit code."""
    return ranks(RANKS).run(end, argv=f"{FLAGS} --save {folder(where)} {more}".split())


def saved(where: Path) -> list[int]:
    return sorted(found.iteration for found in checkpoints(where))


def upstreams_verdict(where: Path) -> None:
    """Raises where upstream's own check of its manifest finds a fault (core/dist_checkpointing/validation.py)."""
    from megatron.core.dist_checkpointing.validation import _verify_integrity_manifest_impl

    _verify_integrity_manifest_impl(str(where))


def tensors(where: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, whole."""
    from megatron_hybrid.checkpoint.weights import read_tensors, tensor_shapes

    return read_tensors(str(where), tensor_shapes(str(where)))


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors of two checkpoints that differ in any bit; read in a rank, which has a process group."""
    import torch

    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and len(a) > 20
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def straight(ranks, tmp_path_factory) -> Path:
    """Nine iterations and all their checkpoints."""
    where = tmp_path_factory.mktemp("straight")
    run(ranks, where)
    return where


def test_every_checkpoint_is_sealed(ranks, straight):
    assert saved(straight) == [2, 4, 6, 8, 9]
    for found in checkpoints(straight):
        assert problems(found.folder) == []
        ranks(1).run(upstreams_verdict, where=found.folder)
    assert (straight / POINTER).read_text() == "9"


@pytest.mark.parametrize("way", ["", "--async-save"], ids=["foreground", "background"])
def test_retention_keeps_the_last_and_multiples(ranks, tmp_path, straight, way):
    told = run(ranks, tmp_path, f"--keep-last 2 --keep-every 4 {way}")
    assert saved(tmp_path) == [4, 8, 9]
    assert [line for line in told[0][0].splitlines() if line.startswith("removed ")] == [
        f"removed {tmp_path}/iter_000000{i} (--keep-last 2)" for i in (2, 6)
    ]
    for found in checkpoints(tmp_path):
        assert problems(found.folder) == []
        ranks(1).run(upstreams_verdict, where=found.folder)
    assert (tmp_path / POINTER).read_text() == "9"
    assert read_state(tmp_path).status == "finished"
    for iteration in (4, 9):  # training went on while iteration 4 was being written
        name = f"iter_{iteration:07d}"
        assert ranks(1).run(differing, one=straight / name, other=tmp_path / name) == [[]]


def test_a_finished_run_is_not_saved_again(ranks, tmp_path, straight):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000009").iterdir()}
    told = run(ranks, tmp_path, f"--load {tmp_path}")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000009").iterdir()} == before
    assert "iter_0000009 is not saved again" in told[0][0]
    assert read_state(tmp_path).status == "finished"


def refused(argv: list[str]) -> str:
    """What the program says as it refuses its flags."""
    try:
        end(argv)
    except AssertionError as error:
        return str(error)
    return "nothing was refused"


def test_a_run_does_not_write_over_checkpoints_that_it_does_not_load(ranks, straight):
    (said,) = ranks(1).run(refused, argv=f"{FLAGS} --save {straight}".split())
    assert f"To go on: --load {straight}" in said
    assert saved(straight) == [2, 4, 6, 8, 9]


def test_the_same_command_starts_a_run_and_starts_it_again(ranks, tmp_path, straight):
    """--load names where the first start begins; later ones go on from the run's own checkpoints."""
    other, where = tmp_path / "other", tmp_path / "run"
    other.mkdir()
    shutil.copytree(straight / "iter_0000004", other / "iter_0000004")
    point_to(other, checkpoints(other)[0])
    run(ranks, where, f"--load {other} --exit-interval 7")
    told = run(ranks, where, f"--load {other}")
    assert f"the run goes on from these, no more from {other}" in told[0][0]
    found = read_metrics(where / "metrics.jsonl")
    assert [start["resume"] for start in found.starts] == [4, 7]
    expected = read_metrics(straight / "metrics.jsonl").train
    for iteration in range(5, 10):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert found.train[iteration][key] == expected[iteration][key]


def test_an_iteration_of_another_run_is_of_the_first_start_alone(ranks, tmp_path, straight):
    """--ckpt-step names an iteration of --load; a restart by the same command goes on from the run's own."""
    where = tmp_path / "run"
    for last in (5, 7):
        run(ranks, where, f"--load {straight} --ckpt-step 4 --exit-interval {last}")
    assert [start["resume"] for start in read_metrics(where / "metrics.jsonl").starts] == [4, 5]


@pytest.mark.parametrize("way", ["", "--async-save"], ids=["foreground", "background"])
def test_a_save_that_is_asked_for_twice_is_made_once(ranks, tmp_path, way):
    """Upstream saves again where the batch grows, which is the iteration that was just saved."""
    flags = FLAGS.replace("--global-batch-size 4", "--step-batch-size-schedule 0:2,384:4")  # of tokens, 32 a sample
    told = ranks(RANKS).run(
        end, argv=f"{flags} --save {folder(tmp_path)} --keep-last 1 --exit-interval 8 {way}".split()
    )
    train = read_metrics(tmp_path / "metrics.jsonl").train
    assert [train[i]["tokens"] for i in (6, 7)] == [384, 512], "the batch did not grow behind iteration 6"
    assert told[0][0].count("saving checkpoint at iteration       6 ") == 1
    assert saved(tmp_path) == [8] and problems(tmp_path / "iter_0000008") == []


def test_what_an_interrupted_save_left_is_no_part_of_the_next_one(ranks, tmp_path, straight):
    shutil.copytree(straight / "iter_0000006", tmp_path / "iter_0000006")
    shutil.copytree(straight / "iter_0000006", tmp_path / "iter_0000008")
    point_to(tmp_path, checkpoints(tmp_path)[1])
    (tmp_path / "iter_0000008" / "integrity.json").unlink()
    (tmp_path / "iter_0000008" / "__7_0.distcp").write_bytes(b"of an eighth rank")
    run(ranks, tmp_path, f"--load {tmp_path}")
    assert saved(tmp_path) == [6, 8, 9]
    listed = json.loads((tmp_path / "iter_0000008" / "integrity.json").read_text())["files"]
    assert "__7_0.distcp" not in listed and not (tmp_path / "iter_0000008" / "__7_0.distcp").exists()
    name = "iter_0000008"
    assert ranks(1).run(differing, one=straight / name, other=tmp_path / name) == [[]]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--keep-last 0", "--keep-last 0: keep at least 1"),
        ("--keep-every 4", "--keep-every 4 without --keep-last"),
        ("--keep-last 1 --keep-every 3", "--keep-every 3 is no multiple of --save-interval 2"),
        ("--save-retain-interval 4", "use --keep-last 1 --keep-every 4"),
        ("--async-save --async-strategy nvrx", "--async-strategy nvrx: it saves from GPUs"),
        ("--async-save --ckpt-format torch", "--ckpt-format torch"),
    ],
)
def test_flags_that_mean_nothing_are_refused(ranks, tmp_path, flags, text):
    (said,) = ranks(1).run(refused, argv=f"{FLAGS} --save {tmp_path} {flags}".split())
    assert text in said, said
