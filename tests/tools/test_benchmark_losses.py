"""tools/benchmarks/losses.py, run as a user runs it, at sizes that take no time."""

import json

import pytest

from megatron_hybrid.benchmarks.loss_comparison import differences
from tests.support.processes import tool

TINY = """--hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --mamba-num-heads 4
--mamba-head-dim 16 --mamba-state-dim 16 --intra-num-attention-heads 2 --intra-num-query-groups 1 --intra-qk-dim 32
--intra-value-dim 64 --intra-ssm-dim 64 --intra-ssm-head-dim 16 --num-blocks 2 --block-ratio 1:1 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 2"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """fp32 twice and another seed: exit code, what was printed, and the losses that were written."""
    folder = tmp_path_factory.mktemp("losses")
    arms = ["first=--no-bf16", "again=--no-bf16", "other=--no-bf16 --seed 9"]
    words = [word for arm in arms for word in ("--arm", arm)]
    options = ["--device", "cpu", "--steps", "3", "--data", folder / "text", "--json", folder / "out.json"]
    done = tool("benchmarks/losses", *words, *options, *TINY.split())
    return done, json.loads((folder / "out.json").read_text()) if (folder / "out.json").exists() else None


def test_the_same_flags_have_the_same_losses_and_others_do_not(run):
    done, report = run
    assert report, done.stdout + done.stderr
    losses = report["losses"]
    assert losses["first"] == losses["again"] and len(losses["first"]) == 3
    assert report["differences"]["again"] == 0
    assert 0 < abs(report["differences"]["other"]) < 0.05, "both are near the logarithm of the vocabulary"
    assert done.returncode == (abs(report["differences"]["other"]) > 0.005)
    assert "mean of the last 3 steps: +0.000%" in done.stdout


def test_the_last_steps_are_compared():
    found = differences({"a": [9.0, 4.0, 2.0], "b": [1.0, 4.5, 1.8]}, last=2)
    assert found == {"a": 0.0, "b": pytest.approx(6.3 / 6 - 1)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm", "one=--no-bf16"], "give at least two"),
        (["--arm", "one", "--arm", "two=--no-bf16"], "NAME=FLAGS"),
        (["--arm", "a=", "--arm", "b=", "--steps", "0"], "--steps is 0"),
    ],
)
def test_mistakes(words, said):
    done = tool("benchmarks/losses", *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
