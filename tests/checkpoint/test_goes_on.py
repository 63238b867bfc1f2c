"""A run that goes on from a checkpoint with other flags: what is refused, what holds, and what is said."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from tests.support.program import end, program
from tests.support.training import SIZES, Run
from tests.training.test_validation import write

PATTERN = "M-*-"
FLAGS = f"""{SIZES} --hybrid-layer-pattern {PATTERN} --micro-batch-size 1 --global-batch-size 4 --num-workers 0
--tokenizer-type NullTokenizer --seed 7 --save-interval 100 --eval-iters 1 --eval-interval 100 --log-interval 1
--use-distributed-optimizer --split 80,20,0 --dist-ckpt-optim-fully-reshardable
--lr 1e-2 --min-lr 1e-3 --lr-decay-style WSD --lr-wsd-decay-iters 2
--lr-warmup-iters 1 --train-iters 4"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    where = tmp_path_factory.mktemp("data")
    return f"--data-path {write(where, 'small', 30, 0)} --data-cache-path {where}/cache"


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory, data) -> str:
    """A run of four steps, whose learning rate has reached its end."""
    where = str(tmp_path_factory.mktemp("trained"))
    text, code = ranks(1).run(
        end, argv=f"{FLAGS} {data} --save {where} --squared-relu".replace("--swiglu", "").split()
    )[0]
    assert code is None, text[-2000:]
    return where


def records(where: str) -> list[dict]:
    lines = (Path(where) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def refusal(ranks, trained, data, more: str) -> str:
    line = f"{FLAGS} {data} --load {trained} --squared-relu".replace("--swiglu", "") + f" {more}"
    code, _, errors = ranks(1).run(program, line=line, sizes=False)[0]
    assert code == 2, errors
    message = errors[errors.index("error: ") :]
    assert "\n\n" not in message and "Traceback" not in errors
    return message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--rotary-base 10", ["rotary_base is 500000 in it and 10 here", "--allow-changed rotary_base"]),
        ("--rotary-percent 0.5", ["rotary_percent is 1.0 in it and 0.5 here", "run.json"]),
        ("--hidden-size 64", ["hidden_size is 32 in it and 64 here", "kv_channels is 8 in it and 16 here"]),
        (
            "--train-iters 8",
            ["--train-iters was 4 and is 8", "16 in the checkpoint, 32 by this run", "--override-opt-param-scheduler"]
            + ["--use-checkpoint-opt_param-scheduler"],
        ),
        ("--global-batch-size 2", ["--global-batch-size was 4 and is 2", "16 in the checkpoint, 8 by this run"]),
        ("--lr 1e-3", ["--lr: 0.01 in the checkpoint, 0.001 by this run", "--override-opt-param-scheduler"]),
        ("--lr-wsd-decay-iters 3", ["--lr-wsd-decay-*): 8 in the checkpoint, 12 by this run"]),
        ("--adam-beta2 0.9", ["--adam-beta2: 0.999 in the checkpoint, 0.9 by this run"]),
        ("--lr-warmup-iters 9", ["--lr-warmup-iters is 9 of 4 iters", "Make it shorter"]),
        ("--allow-changed lr", ["--allow-changed lr", "may change without it"]),
    ],
)
def test_a_change_is_refused_before_the_model_is_built(ranks, trained, data, more, words):
    message = refusal(ranks, trained, data, more)
    for word in words:
        assert word in message


@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_a_longer_run_under_another_learning_rate(ranks, tmp_path, data, trained, optimizer):
    """--override-opt-param-scheduler gives the schedule of the flags, the other flag the checkpoint's; moments stay."""
    flags, start = f"{FLAGS} {data}".split(), trained
    flags = [f for f in flags if f != "--swiglu"] + ["--squared-relu"]
    if optimizer == "plain":
        flags.remove("--use-distributed-optimizer")
        start = str(tmp_path / "start")
        ranks(1).run(end, argv=[*flags, "--save", start])
    rates = {}
    for way, flag in (("flags", "--override-opt-param-scheduler"), ("kept", "--use-checkpoint-opt_param-scheduler")):
        where = str(tmp_path / way)
        more = f"--load {start} --save {where} --train-iters 8 --lr 2e-2 --adam-beta2 0.9 {flag}"
        text, code = ranks(1).run(end, argv=[*flags, *more.split()])[0]
        assert code is None, text[-2000:]
        assert ("0.02, and 0.01 in the checkpoint" if way == "flags" else "0.01 as in the checkpoint, not 0.02") in text
        assert "training on small takes 2 passes over the data" in text  # 8 x 4 samples of 32 tokens out of some 500
        rates[way] = [r["learning_rate"] for r in records(where)]
        assert [r["iteration"] for r in records(where)] == [5, 6, 7, 8]
    # the stable part at the new rate until two steps before the end; the log has the rate of the step that follows
    assert rates["flags"] == pytest.approx([2e-2, 2e-2, 1e-3 + 0.019 * (2 * 0.5**0.5 - 1), 1e-3])
    assert rates["kept"] == pytest.approx([1e-3] * 4)


@pytest.mark.parametrize(
    "length",
    [
        "--train-samples 16 --lr-decay-style WSD --lr-wsd-decay-samples 8 --lr-warmup-samples 6",
        "--train-samples 16 --lr-decay-style cosine --lr-decay-samples 14 --lr-warmup-fraction 0.5",
        "--train-iters 4 --lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-iters 1",
    ],
)
def test_the_same_command_goes_on_under_the_same_schedule(ranks, tmp_path, data, length):
    flags = FLAGS[: FLAGS.index("--lr-decay-style")] + f"{data} {length}"
    rates = {}
    for name, stops in (("straight", [""]), ("stopped", ["--exit-interval 2", ""])):
        where = tmp_path / name
        for stop in stops:
            text, code = ranks(1).run(end, argv=f"{flags} --save {where} --load {where} {stop}".split())[0]
            assert code in (None, 0), text[-2000:]
            assert "WARNING: " not in "".join(line for line in text.splitlines() if line.startswith("note"))
        rates[name] = [(r["iteration"], r["learning_rate"], r["loss"]) for r in records(str(where))]
    assert rates["stopped"] == rates["straight"] and len(rates["straight"]) == 4


def test_a_cool_down_that_is_no_whole_steps_is_refused(ranks, trained, data):
    more = "--global-batch-size 3 --use-checkpoint-opt_param-scheduler"
    assert "the checkpoint's cool-down is 8 samples" in refusal(ranks, trained, data, more)


def test_fp16_saves_before_its_first_update(ranks, tmp_path, data):
    """Its loss scale starts so high that the first steps are skipped; then there are no moments yet."""
    flags = f"{FLAGS} {data} --fp16 --save {tmp_path}/run --load {tmp_path}/run"
    for stop in ("--exit-interval 1", ""):
        text, code = ranks(1).run(end, argv=f"{flags} {stop}".split())[0]
        assert code in (None, 0), text[-2000:]
    assert "number of skipped iterations:   1" in text
    assert [r["iteration"] for r in records(f"{tmp_path}/run")] == [1, 2, 3, 4]


def test_evaluation_needs_no_part_to_train_on_nor_a_length(ranks, trained, data):
    flags = FLAGS.replace("--split 80,20,0", "--split 0,100,0").replace("--train-iters 4", "").replace("--swiglu", "")
    text, code = ranks(1).run(end, argv=f"{flags} {data} --squared-relu --load {trained} --skip-train".split())[0]
    assert code is None and "validation loss at iteration 4" in text, text[-2000:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 0", ["--seed is 0", "at least 1"]),
        ("--skip-train --load nowhere", ["There is nothing to load", "nowhere has no checkpoint"]),
        ("--split 0,100,0", ["leaves nothing to train on"]),
    ],
)
def test_mistakes_that_would_end_later(ranks, data, flags, words):
    code, _, errors = ranks(1).run(program, line=f"{FLAGS} {data} {flags}", sizes=False)[0]
    assert code == 2, errors
    for word in words:
        assert word in errors


def test_training_data_by_themselves_need_validation_data(ranks, data):
    path, *cache = data.split()[1:]
    line = FLAGS.replace("--split 80,20,0", f"--train-data-path {path} {' '.join(cache)}")
    code, _, errors = ranks(1).run(program, line=line, sizes=False)[0]
    assert code == 2 and "add --valid-data-path" in errors and "--eval-iters 0" in errors


def unknown(names: list[str]) -> list[str]:
    """Those that are no arguments of a run."""
    args = vars(Run("M-").args)
    return [name for name in names if name not in args]


def test_every_setting_that_is_compared_is_an_argument(ranks):
    from megatron_hybrid.checkpoint.stored_settings import SHAPES, STORED, computed_by

    names = [*SHAPES.split(), *computed_by()]
    assert ranks(1).run(unknown, names=[*names, *STORED])[0] == []


def orders(path: str, counts: list[int]) -> list[list[list[int]]]:
    """Tokens of the first samples of training sets for so many samples."""
    from megatron_hybrid.training.provider import datasets

    args = Run("M-").args
    args.mock_data, args.data_path, args.split = False, [path], "80,20,0"
    args.data_cache_path = str(Path(path).parent / "cache")
    sets = [datasets([count, 0, 0])[0] for count in counts]
    return [[sample["tokens"].tolist() for sample in (found[i] for i in range(6))] for found in sets]


def test_the_order_of_samples_changes_where_we_say_so(ranks, data):
    """The key that two lengths of a run are compared by, against the data sets that Megatron makes."""
    from megatron_hybrid.training.data_order import _order, _part_tokens

    counts = [8, 10, 16, 24, 28, 32, 40]
    path = data.split()[1]
    found = ranks(1).run(orders, path=path, counts=counts)[0]
    described = Namespace(data_path=[path], data_args_path=None, split="80,20,0")
    keys = [_order(_part_tokens(path, "training", described), count, 32) for count in counts]
    assert len(set(keys)) > 3
    for i in range(len(counts)):
        for j in range(i):
            assert (found[i] == found[j]) == (keys[i] == keys[j]), (counts[j], counts[i], keys[j], keys[i])
    assert np.asarray(found).shape == (len(counts), 6, 32)
