"""A layer from outside of the package (examples/custom_layer) in every use of a run: no line of the package changes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import program
from tests.support.training import folder, initial_checkpoint, losses

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples/custom_layer/short_conv.py"
FLAGS = f"--layers-from {FILE} --short-conv-taps 3 --short-conv-channels 24"
PATTERN = "C-*-C-C-"
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
RTOL = 1e-5  # as of all layouts (tests/model/test_layouts.py)


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory) -> tuple[str, list]:
    where = folder(tmp_path_factory.mktemp("custom"))
    ranks(1).run(initial_checkpoint, pattern=PATTERN, folder=where, flags=FLAGS)
    return where, ranks(1).run(losses, pattern=PATTERN, load=where, flags=FLAGS)[0]


@pytest.mark.parametrize(
    ("size", "pattern", "flags"),
    [
        (2, PATTERN, f"{TP2} --use-distributed-optimizer"),
        (2, PATTERN, f"{TP2} {SP}"),
        (2, "C-*-|C-C-", PP2),
        (2, "C-|*-|C-|C-", PP2),
        (4, "C-*-|C-C-", f"{TP2} {SP} {PP2}"),
    ],
)
def test_layouts_equal_one_process(ranks, one_process, size, pattern, flags):
    where, expected = one_process
    for found in ranks(size).run(losses, pattern=pattern, load=where, flags=f"{FLAGS} {flags}"):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=RTOL)


def against_the_formula(flags: str) -> dict[str, float]:
    """The largest differences of the layer's output and gradients from y = W_out(c * conv(b * x)), written out."""
    import torch

    from tests.support.training import Run

    # gradients from autograd, not in DDP's buffers
    layer = Run("C", f"{flags} --no-gradient-accumulation-fusion").model[0].module.decoder.layers[0]
    torch.manual_seed(5)
    h = torch.randn(7, 2, 32, requires_grad=True)
    y, _ = layer(h, None)
    dy = torch.randn_like(y)
    mixer, norm = layer.self_attention, layer.input_layernorm
    weights = [mixer.in_proj.weight, mixer.conv, mixer.out_proj.weight]
    ours = torch.autograd.grad(y, [h, *weights], dy)

    taps = mixer.conv.shape[-1]
    b, c, x = (torch.nn.functional.rms_norm(h, (32,), norm.weight, norm.eps) @ weights[0].T).chunk(3, -1)
    bx = b * x
    mixed = sum(
        weights[1][:, 0, taps - 1 - back] * torch.cat([torch.zeros_like(bx[:back]), bx[: len(bx) - back]])
        for back in range(taps)
    )
    expected = h + (c * mixed) @ weights[2].T
    theirs = torch.autograd.grad(expected, [h, *weights], dy)
    pairs = [(y, expected), *zip(ours, theirs, strict=True)]
    return {f"{i}": float((a - e).abs().max() / e.abs().max()) for i, (a, e) in enumerate(pairs)}


def test_the_layer_is_its_formula(ranks):
    (found,) = ranks(1).run(against_the_formula, flags=FLAGS)
    assert len(found) == 5 and all(error < 1e-5 for error in found.values()), found  # fp32, sums in another order


def counted(flags: str) -> dict[str, Any]:
    """Parameters as built and as counted on this rank, in the order of the model."""
    from megatron_hybrid import costs
    from megatron_hybrid.costs.parameters import layer_tensors
    from tests.support.training import Run

    run = Run("C", flags)
    layer = run.model[0].module.decoder.layers[0]
    sizes = costs.sizes_of(run.args)
    return {
        "built": [p.numel() for p in layer.parameters()],
        "counted": [t.size for t in layer_tensors("C", sizes, run.args.tensor_model_parallel_size)],
        "cache": costs.layer_cache("C", sizes, 100).conv,
    }


@pytest.mark.parametrize(("size", "flags"), [(1, ""), (2, TP2)])
def test_parameters_are_as_built(ranks, size, flags):
    for found in ranks(size).run(counted, flags=f"{FLAGS} {flags}"):
        assert found["built"] == found["counted"] and found["cache"] == 24 * 2


def test_a_run_saves_in_one_layout_and_resumes_in_another(ranks, tmp_path):
    """The program itself: three steps at TP2 with sequence parallelism, three more at two balanced stages."""
    from tests.support.training import SIZES, STEPS

    def steps(name: str) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["iteration"], line["loss"]) for line in lines if "grad_norm" in line]

    base = f"{SIZES} {STEPS} {FLAGS} --train-iters 6 --eval-iters 0 --log-interval 1 --num-workers 0 --device cpu"
    argv = [*base.split(), "--hybrid-layer-pattern", PATTERN]
    split = [*argv, *TP2.split(), SP]
    ranks(2).run(program.train, argv=[*split, "--save", str(tmp_path / "whole"), "--save-interval", "100"])
    run = str(tmp_path / "run")
    first = [*split, "--save", run, "--save-interval", "3", "--exit-interval", "3"]
    assert {code for _, code in ranks(2).run(program.end, argv=first)} <= {0, None}
    second = [*argv, "--balance-pipeline", "2", "--load", run, "--save", run, "--save-interval", "100"]
    ranks(2).run(program.train, argv=second)
    found, expected = steps("run"), steps("whole")
    assert [n for n, _ in found] == [n for n, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=RTOL)


def test_a_plan_knows_the_layer():
    model = """--hidden-size 64 --num-attention-heads 4 --normalization RMSNorm --position-embedding-type rope --swiglu
        --disable-bias-linear --vocab-size 512 --seq-length 128 --max-position-embeddings 128"""
    run = "--micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --balance-pipeline 2 --gpus 2 --json"
    words = f"{FLAGS} {model} {run} --hybrid-layer-pattern (C-)3*-".split()
    done = subprocess.run([sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    part = next(p for p in found["parts"] if p["symbol"] == "C")
    assert part["count"] == 3 and part["name"] == "gated short convolution"
    # norm, taps, and both projections
    assert part["parameters"] == 3 * (64 + 24 * 3 + 64 * 3 * 24 + 24 * 64)
    assert "|" in found["pattern"]


def test_plans_compare_it():
    model = """--hidden-size 64 --num-attention-heads 4 --normalization RMSNorm --position-embedding-type rope --swiglu
        --disable-bias-linear --vocab-size 512 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1
        --global-batch-size 8 --train-iters 10 --lr 1e-3 --mamba-num-groups 1"""
    words = [*f"{FLAGS} {model} --json --compare".split(), "C-*-", "M-*-"]
    done = subprocess.run([sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)["architectures"]] == ["C-*-", "M-*-"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (FLAGS.replace("24", "25"), "--short-conv-channels is 25 and must be a multiple of --tensor-model-parallel"),
        (FLAGS.replace("taps 3", "taps 0"), "--short-conv-taps is 0"),
    ],
)
def test_its_check_refuses(ranks, flags, words):
    with pytest.raises(AssertionError, match=words):
        ranks(2).run(initial_checkpoint, pattern="C-", folder="/nowhere", flags=f"{flags} {TP2}")
