"""A run goes on in another layout, or on another number of processes, through the program itself.

tests/checkpoint/test_reshard.py compares weights and optimizer state bit by bit; here the data order, the
schedule and the loop take part too. What is compared with is a run that stays in the first layout: another layout has
other random weights from the start.
"""

import functools
import json
import subprocess
from pathlib import Path

import pytest

from megatron_hybrid.run_folder.state import read_state
from tests.cli.test_command_line import PROGRAM, run
from tests.data.corpora import random_tokens

# One layer of each kind; the router has a bias that training moves. No dropout: its draws are those of a layout.
FLAGS = """--recipe demo --train-iters 6 --lr-wsd-decay-iters 2 --seq-length 64 --micro-batch-size 1
    --global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 100 --split 80,10,10 --eval-interval 100
    --eval-iters 1 --save-interval 3 --device cpu"""
PATTERN = "MEP-*-WE"
LAYOUTS = {
    "dp2": (2, PATTERN, ""),
    "dp4": (4, PATTERN, ""),
    "dp1": (1, PATTERN, ""),
    "tp2": (2, PATTERN, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "MEP-|*-WE", "--pipeline-model-parallel-size 2"),
    "ep2": (2, PATTERN, "--expert-model-parallel-size 2"),
}


def train(where: Path, corpus: Path, layout: str, *more: str) -> subprocess.CompletedProcess:
    size, pattern, flags = LAYOUTS[layout]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size))
    words = f"""{FLAGS} --hybrid-layer-pattern {pattern} --expert-model-parallel-size 1 {flags} --data-path {corpus}
        --data-cache-path {corpus.parent}/cache --save {where} --load {where}"""
    done = run(*launch, PROGRAM, *words.split(), *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def steps(where: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each iteration, those of the last time that it ran."""
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    return {r["iteration"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return random_tokens(tmp_path_factory.mktemp("corpus"), documents=200)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """``straight(layout)``: the steps of a run that stays in it."""

    @functools.cache
    def of(layout: str) -> dict[int, tuple[float, float]]:
        where = tmp_path_factory.mktemp("straight")
        train(where, corpus, layout)
        return steps(where)

    return of


@pytest.mark.parametrize(
    ("first", "second"), [("dp2", "dp4"), ("dp1", "tp2"), ("dp1", "pp2"), ("tp2", "dp1"), ("pp2", "ep2")]
)
def test_a_run_goes_on_in_another_layout(tmp_path, corpus, straight, first, second):
    train(tmp_path, corpus, first, "--exit-interval", "3")
    assert read_state(tmp_path).status == "stopped"
    train(tmp_path, corpus, second)
    assert read_state(tmp_path).status == "finished"
    found = steps(tmp_path)
    assert list(found) == list(straight(first)) == [1, 2, 3, 4, 5, 6]
    for iteration, wanted in straight(first).items():
        # as in test_parity: the same sums in another order, in float32
        assert found[iteration] == pytest.approx(wanted, rel=1e-5), iteration
