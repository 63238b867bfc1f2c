"""The step benchmark on a GPU: what it adds to its report there, and the micro-batch that a recipe takes."""

import json
import re

import pytest
import torch

from tests.support.processes import ROOT, python
from tests.tools.test_benchmark_step import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SMALL = TINY.replace("--no-bf16 ", "")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("step") / "out.json"
    words = ["--recipes", "paper-100m-intra", "--micro-batch-size", "2", "--micro-batches", "2", "--steps", "3"]
    done = python(ROOT / "tools/benchmarks/step.py", *words, *SMALL.split(), "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "idle:" in done.stdout
    return json.loads(file.read_text())


def test_kernels_of_a_step(report):
    (row,) = report["rows"]
    assert {"matrix products", "scan", "convolution", "attention", "norms", "optimizer"} <= set(row["classes_ms"])
    assert sum(row["classes_ms"].values()) == pytest.approx(sum(kernel["ms"] for kernel in row["kernels"]))
    assert 0 < row["busy_ns"] / 1e9 <= row["profiled_seconds"]
    assert row["idle"] == pytest.approx(max(0, 1 - row["busy_ns"] / 1e9 / row["median_seconds"]))


def test_few_kernels_have_no_class(report):
    (row,) = report["rows"]
    assert row["classes_ms"].get("other", 0) < 0.1 * sum(row["classes_ms"].values())


def test_a_recipe_takes_the_largest_micro_batch_that_fits():
    words = ["--recipe", "paper-1b-intra", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "0"]
    done = python(ROOT / "pretrain_hybrid.py", *words, "--print-config")
    assert done.returncode == 0, done.stderr
    size = int(re.search(r"--micro-batch-size (\d+)", done.stdout)[1])
    plenty = torch.cuda.get_device_properties(0).total_memory > 120 * 2**30
    assert size >= 4 if plenty else size >= 1
