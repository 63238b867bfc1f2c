"""What training says of its throughput, in real runs of the program on two ranks.

Times are those of the run itself, so every figure is recomputed from the record's own seconds: equal to the bit.
"""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid import costs
from megatron_hybrid import pattern as language
from tests.support.program import train
from tests.support.training import MOE, SIZES, folder

GROWING = "--train-samples 28 --lr-decay-samples 100 --lr-warmup-samples 0 --eval-interval 100"
GROWTH = ["--step-batch-size-schedule", "0:2 128:6"]
"""Tokens seen, and the samples of a batch from there; a sample is 32 tokens."""
GROWN = [2, 2, 6, 6, 6, 6]
"""Samples of each step."""
FLAGS = f"""{SIZES} {MOE} --mamba-num-heads 4 --micro-batch-size 1 --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant
--tokenizer-type NullTokenizer --mock-data --seed 7 --log-interval 2 --eval-iters 1 --num-workers 0
--save-interval 100 --no-save-optim --no-save-rng"""


def saved_flops(checkpoint: str) -> float:
    """What Megatron's counter has summed up by then."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(checkpoint)["num_floating_point_operations_so_far"]


class Trained:
    """A run's output and files."""

    def __init__(self, where: Path, outputs: list[str]):
        self.where = where
        info = json.loads((where / "run.json").read_text())
        self.args = Namespace(**info["args"])
        self.said = outputs[-1]  # upstream's log lines are the last rank's
        self.first = outputs[0]
        records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        self.starts = [r for r in records if "resume" in r]
        self.steps: list[dict[str, Any]] = [r for r in records if "loss" in r]
        before = [0, *(r["samples"] for r in self.steps)]
        self.batches = [r["samples"] - b for r, b in zip(self.steps, before, strict=False)]

    def flops(self, samples: int) -> float:
        layers = language.parse(self.args.hybrid_layer_pattern)
        return costs.training_flops(layers, costs.sizes_of(self.args), samples)

    def lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if " GiB" in line and "peak" in line]


@pytest.fixture(scope="module")
def replicas(ranks, tmp_path_factory) -> Trained:
    """All layers and two MTP heads on two data-parallel ranks, with micro-batches and a growing batch; no peak."""
    where = tmp_path_factory.mktemp("replicas")
    line = f"{FLAGS} {GROWING} --hybrid-layer-pattern M-P-W-GE*-/P-/P- --save {folder(where)}"
    return Trained(where, ranks(2).run(train, argv=line.split() + GROWTH))


@pytest.fixture(scope="module")
def stages(ranks, tmp_path_factory) -> Trained:
    """Two pipeline stages, with a peak, a validation between, and upstream's own figure in the log."""
    where = tmp_path_factory.mktemp("stages")
    line = f"""{FLAGS} --hybrid-layer-pattern M-P-|WEG- --pipeline-model-parallel-size 2 --global-batch-size 3
    --train-iters 6 --eval-interval 4 --peak-tflops 0.25 --log-throughput --save {folder(where)}"""
    return Trained(where, ranks(2).run(train, argv=line.split()))


def test_figures_are_work_by_seconds(replicas, stages):
    assert replicas.batches == GROWN
    assert stages.batches == [3] * 6
    for run in (replicas, stages):
        timed = [(r, n) for r, n in zip(run.steps, run.batches, strict=True) if r["seconds"] is not None]
        assert len(timed) >= 4
        for record, samples in timed:
            assert record["tokens_per_second"] == samples * 32 / record["seconds"]
            assert record["tflops_per_gpu"] == run.flops(samples) / record["seconds"] / 2 / 1e12


def test_megatrons_own_counter_is_replaced(ranks, replicas, stages):
    """It makes the figure of ``--log-throughput``, and the sum that checkpoints keep."""
    for run in (replicas, stages):
        work = sum(run.flops(samples) for samples in run.batches)
        assert ranks(1).run(saved_flops, checkpoint=str(run.where / "iter_0000006")) == [work]


def test_the_work_counts_every_layer(replicas):
    """A figure that left one of them out would still agree with itself: each must cost something.

    How much is test_flops.py's to say, by torch's own counter.
    """
    whole = replicas.flops(1)
    sizes = costs.sizes_of(replicas.args)
    for less in ("M-W-GE*-/P-/P-", "M-P-GE*-/P-/P-", "M-P-W-E*-/P-/P-", "M-P-W-G*-/P-/P-", "M-P-W-GE*-/P-"):
        assert costs.training_flops(language.parse(less), sizes, 1) < whole
    assert sizes.mamba_heads == 4  # of 8 that the hidden size would give


def test_no_time_no_figure(replicas, stages):
    # the first step; behind the save that upstream makes when the batch grows; behind a validation
    for run, untimed in ((replicas, [1, 3]), (stages, [1, 5])):
        assert [r["iteration"] for r in run.steps if r["seconds"] is None] == untimed
        for record in run.steps:
            known = record["seconds"] is not None
            assert (record["tokens_per_second"] is not None) == known
            assert (record["tflops_per_gpu"] is not None) == known
            assert (record.get("mfu") is not None) == (known and run is stages)


def test_mfu_needs_a_peak(replicas, stages):
    assert not any({"mfu", "peak_tflops", "peak_name"} & set(r) for r in replicas.steps)
    assert "MFU " not in replicas.said.replace("MFU is not logged", "")
    assert replicas.first.count("MFU is not logged") == 1 and "--peak-tflops N" in replicas.first
    assert "MFU is not logged" not in stages.first
    for record in stages.steps:
        assert (record["peak_tflops"], record["peak_name"]) == (0.25, "--peak-tflops")
        if record["seconds"] is not None:
            assert record["mfu"] == record["tflops_per_gpu"] / 0.25 > 0


def test_the_log_has_the_mean_of_each_interval(replicas, stages):
    for run in (replicas, stages):
        assert len(run.lines()) == 3  # six steps, every second one
        for i, line in enumerate(run.lines()):
            pair = zip(run.steps[2 * i : 2 * i + 2], run.batches[2 * i : 2 * i + 2], strict=True)
            steps = [(n, r["seconds"]) for r, n in pair if r["seconds"] is not None]
            samples, seconds = sum(n for n, _ in steps), sum(s for _, s in steps)
            assert f" tokens/s: {samples * 32 / seconds:,.0f} | " in line
            mfu = re.search(r"MFU (\S+)% of 0.25 \(--peak-tflops\)", line)
            if run is stages:
                # one decimal is printed
                assert float(mfu[1]) == pytest.approx(100 * run.flops(samples) / seconds / 2 / 0.25e12, abs=0.051)
            else:
                assert mfu is None


def test_tflops_are_said_once(replicas, stages):
    assert all("TFLOP/s per process: " in line for line in replicas.lines())
    assert "throughput per GPU (TFLOP/s/GPU)" not in replicas.said
    assert not any("TFLOP/s" in line for line in stages.lines())
    assert stages.said.count("throughput per GPU (TFLOP/s/GPU)") == 4  # with the first step, as upstream has it


def test_peak_memory_is_the_largest_processes_so_far(replicas, stages):
    for run in (replicas, stages):
        sizes = [(r["iteration"], r["peak_resident_bytes"]) for r in run.steps if "peak_resident_bytes" in r]
        assert [iteration for iteration, _ in sizes] == [2, 4, 6]
        # a process that has imported torch and Megatron has hundreds of megabytes, and these models next to nothing
        assert all(2e8 < size < 8e9 for _, size in sizes)
        assert [size for _, size in sizes] == sorted(size for _, size in sizes)
        assert not any("peak_memory_bytes" in r for r in run.steps)
        for line, (_, size) in zip(run.lines(), sizes, strict=True):
            assert f"peak resident memory: {size / 2**30:.1f} GiB" in line


def test_the_file_says_how_a_run_starts(replicas, stages):
    for run, layout in ((replicas, {"pp": 1, "dp": 2}), (stages, {"pp": 2, "dp": 1})):
        (start,) = run.starts
        assert 0 < run.steps[0].pop("time") - start.pop("time") < 600
        fresh = {"resume": 0, "samples": 0, "tokens": 0, "checkpoint": None}
        sizes = {"tp": 1, "cp": 1, "ep": 1, **layout}
        assert start == {**fresh, "processes": 2, "layout": sizes, "device": "cpu", "backend": "torch"}


def test_expert_loads_stand_at_each_interval(replicas, stages):
    """How they are counted is test_expert_loads.py's to say; here the records, the log and what is read from them."""
    for run, layer in ((replicas, "8"), (stages, "6")):  # of M-P-W-GE*- and M-P-WEG-
        found = {r["iteration"]: r["expert_loads"] for r in run.steps if "expert_loads" in r}
        assert list(found) == [2, 4, 6]
        said = re.findall(r"busiest expert: (\S+) times the mean load, in layer (\d+)", run.said)
        for (times, name), loads in zip(said, found.values(), strict=True):
            (shares,) = loads.values()
            assert list(loads) == [name] == [layer]
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=1e-4)  # five digits are written
            assert float(times) == pytest.approx(max(shares) * 4, abs=0.0051)  # two decimals are printed
