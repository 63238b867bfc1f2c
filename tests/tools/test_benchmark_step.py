"""tools/benchmarks/step.py, run as a user runs it, at sizes that take no time."""

import json
import shlex

import pytest

from tests.support.processes import ROOT, python

TINY = """--hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --mamba-num-heads 4
--mamba-head-dim 16 --mamba-state-dim 16 --intra-num-attention-heads 2 --intra-num-query-groups 1 --intra-qk-dim 32
--intra-value-dim 64 --intra-ssm-dim 64 --intra-ssm-head-dim 16 --num-blocks 2 --block-ratio 1:1 --seq-length 64
--max-position-embeddings 64 --vocab-size 128 --no-bf16 --peak-tflops 0.5"""
ENDS = {"json": "json", "plot": "png", "card": "md"}
ALWAYS = ["--device", "cpu", "--steps", "3", "--micro-batches", "2", *TINY.split()]


def step(*words):
    return python(ROOT / "tools/benchmarks/step.py", *words, *ALWAYS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe, an arm of other layers and one that is refused: what it printed and what it wrote."""
    folder = tmp_path_factory.mktemp("step")
    arms = ["--arm", "three=--mamba-num-groups 3", "--arm", "inter=--block-mixers *:M"]
    done = step(
        "--recipes",
        "paper-100m-intra",
        *arms,
        "--json",
        folder / "out.json",
        "--plot",
        folder / "out.png",
        "--card",
        folder / "out.md",
    )
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    return done, json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text()


def test_rows(run):
    done, report, _ = run
    rows = {row["arm"]: row for row in report["rows"]}
    assert list(rows) == ["ours", "three", "inter"]
    for arm, layers in (("ours", "M-P-"), ("inter", "*-M-")):
        row = rows[arm]
        assert sorted(row["pattern"]) == sorted(layers)
        assert len(row["seconds"]) == 3 and row["first_step_seconds"] > 0 and row["start_seconds"] > 0
        assert (row["micro_batch"], row["micro_batches"], row["tokens"]) == (1, 2, 128)
        assert row["tokens_per_second"] == pytest.approx(128 / row["median_seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["median_seconds"] / 0.5e12)
        assert row["peak_bytes"] > 2**27, "a process with torch"
        assert f"paper-100m-intra  {arm} " in done.stdout
    assert "torch 2." in done.stdout and "MFU: FLOPs / (seconds x GPUs x peak)" in done.stdout
    assert "idle:" not in done.stdout, "a line that needs a GPU"


def test_flops_are_those_of_the_plan(run):
    from megatron_hybrid import costs
    from megatron_hybrid.plan.subject import read

    for row in run[1]["rows"]:
        if "error" not in row:
            planned = read(shlex.split(row["flags"]), device="cpu")
            assert row["flops"] == costs.training_flops(planned.pattern, planned.sizes, planned.layout.global_batch)
            assert row["parameters"] == costs.model_parameters(planned.pattern, planned.sizes).total


def test_a_run_that_is_refused_leaves_the_others(run):
    done, report, _ = run
    assert done.returncode == 1
    (refused,) = [row for row in report["rows"] if row["arm"] == "three"]
    assert "--mamba-num-groups" in refused["error"] and "seconds" not in refused
    assert done.stdout.count("FAILED") == 1


def test_card(run):
    done, report, card = run
    assert card.startswith("# Training steps, cpu, 20") and "[out.json](out.json), [out.png](out.png)" in card
    assert report["command"] in card and "torch 2." in card and "FAILED" in card
    assert f"{report['rows'][0]['mfu']:.1%}" in card


def test_the_list_shows_commands_and_starts_nothing():
    done = step("--recipes", "paper-100m-intra", "--list", "--micro-batch-size", "3", "--arm", "te=--backend te")
    assert done.returncode == 0, done.stderr
    name, command, other, with_te = done.stdout.splitlines()
    assert (name, other) == ("paper-100m-intra", "paper-100m-intra, te")
    assert command.endswith("--micro-batch-size 3 --global-batch-size 6") and "--train-iters 4 " in command
    assert "--backend te" in with_te and "--backend te" not in command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes", "paper-100m-itra"], "did you mean"),
        (["--recipes", "paper-100m-intra", "--steps", "0"], "--steps is 0 and must be at least 1"),
        (["--recipes", "paper-100m-intra", "--arm", "te"], "--arm 'te': give a name and flags"),
        (["--recipes", "paper-100m-intra", "--arm", "ours=--bf16"], "--arm ours: there is an arm of that name"),
    ],
)
def test_mistakes(words, said):
    done = python(ROOT / "tools/benchmarks/step.py", *ALWAYS, *words)
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
