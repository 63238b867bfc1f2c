"""Command lines as plans read them."""

import os
import sys

import pytest

from megatron_hybrid.plan import figures
from megatron_hybrid.plan.subject import read
from tests.plan.support import DEMO, planned, small


def test_reading_leaves_the_process_as_it_was(monkeypatch):
    for name, value in {"WORLD_SIZE": "7", "RANK": "5", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    words, environment = list(sys.argv), dict(os.environ)
    subject = read([*DEMO.split(), "--tensor-model-parallel-size", "2", "--sequence-parallel"])
    assert subject.layout.world == subject.layout.tp * subject.layout.dp == 4  # the fewest, not 7: tp 2 and ep 2
    assert (sys.argv, dict(os.environ)) == (words, environment)
    with pytest.raises(ValueError):
        read([*DEMO.split(), "--tensor-model-parallel-size", "3"])
    assert (sys.argv, dict(os.environ)) == (words, environment)


def test_a_run_on_cuda_is_planned_without_one():
    assert planned(DEMO).args.device == "cuda"
    assert read(DEMO.split(), device="cpu").args.device == "cpu"


def test_kernels_that_are_not_here_are_planned_by_name():
    words = ["--recipe", "paper-1b-mamba"]
    found = {
        name: read([*words, *given])
        for name, given in {
            "triton": [],
            "mamba_ssm": ["--ssm-kernels", "mamba_ssm"],
            "torch": ["--ssm-kernels=torch"],
        }.items()
    }
    assert {name: subject.args.ssm_kernels for name, subject in found.items()} == {name: name for name in found}
    assert all(subject.argv[-2:] == ["--ssm-kernels", name] for name, subject in found.items())
    most = {name: max(row["activations"] for row in figures.memory(subject)) for name, subject in found.items()}
    assert most["triton"] < most["mamba_ssm"] < most["torch"]
    assert read(words, device="cpu").args.ssm_kernels == "torch"
    with pytest.raises(ValueError, match="--ssm-kernels triton: triton needs a CUDA device"):
        read([*words, "--ssm-kernels", "triton"], device="cpu")


def test_more_gpus_are_replicas():
    layout = planned("--recipe paper-1b-intra --tensor-model-parallel-size 2", 64).layout
    assert (layout.tp, layout.dp, layout.world) == (2, 32, 64)


def test_stages_that_megatron_cuts_itself_are_in_the_pattern():
    subject = small("M-*-M-*-", "--pipeline-model-parallel-size 4")
    assert str(subject.pattern) == "M-|*-|M-|*-" and subject.args.hybrid_layer_pattern == "M-*-M-*-"


@pytest.mark.parametrize(
    ("line", "gpus", "text"),
    [
        ("--recipe demo", None, "needs --vocab-size"),
        ("--recipe paper-1b-itra", None, "did you mean paper-1b-intra"),
        ("", None, "has no layers"),
        ("--recipe paper-1b-intra", 0, "--gpus 0: give at least 1"),
        ("--recipe paper-1b-intra", -8, "--gpus -8: give at least 1"),
        ("--recipe paper-1b-intra --tensor-model-parallel-size 2", 3, "3 processes do not divide"),
        ("--recipe paper-1b-intra --tensor-model-parallel-size 3", 3, "must be a multiple"),
        ("--recipe paper-1b-intra --pipeline-model-parallel-size 4", 4, "do not divide over 4 pipeline stages"),
        ("--recipe paper-1b-intra --micro-batch-size 3", 8, "is not a multiple of --micro-batch-size 3 times 8"),
        ("--recipe paper-1b-intra --vocab-size -5", 8, "--vocab-size is -5 and must be at least 1"),
        ("--recipe paper-1b-intra --train-iters -4", 8, "--train-iters is -4 and must be at least 0"),
        ("--recipe paper-1b-intra --backend te --fp4-format e2m1", 8, "--fp4-format: memory and time .* Drop it"),
        ("--recipe paper-1b-intra --backend te --fp8-format e5m2", 8, "--fp8-format e5m2 .* counted are e4m3, hybrid"),
        ("--recipe paper-1b-intra --backend te --fp8-format hybrid --fp8-recipe mxfp8", 8, "--fp8-recipe mxfp8 is not"),
        (
            "--recipe paper-1b-llama --backend te --fp8-format hybrid --ffn-hidden-size 8200",
            8,
            "- layers .* 8200 x 2048",
        ),
        ("--recipe paper-1b-llama --backend te --fp8-format hybrid --seq-length 8184", 8, "8184 tokens on each rank"),
        ("--recipe paper-1b-intra --hiden-size 3", 8, "Did you mean --hidden-size"),
    ],
)
def test_what_a_run_is_refused_for(line, gpus, text):
    with pytest.raises(ValueError, match=text):
        read(line.split(), gpus)
