"""Layouts that a plan proposes."""

import dataclasses
import json

import pytest

from megatron_hybrid.plan import fit
from megatron_hybrid.plan.figures import memory
from megatron_hybrid.plan.subject import read
from megatron_hybrid.plan.time import step_time
from tests.plan.support import RUNS, SMALL, fitted, machine


@pytest.mark.parametrize("name", RUNS)
def test_what_is_proposed_is_accepted_and_fits(name):
    """Each through a run's own checks, from its flags alone, and below the limit as a plan of these flags says."""
    found, argv, gpus = fitted(name)
    m = machine(memory=RUNS[name][2] * 2**30)
    assert found["limit"] == 0.9 * m.memory and found["gpus"] == gpus
    assert 0 < len(found["proposals"]) <= 2 and found["fitting"] <= found["tried"] and found["least"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for p in found["proposals"]:
        s = read([*argv, *p["flags"]], gpus)
        assert dataclasses.asdict(s.layout) == p["layout"] and s.layout.world == gpus
        assert str(s.pattern) == p["pattern"]
        fullest = max(memory(s), key=lambda row: row["total"])
        assert p["memory"] == fullest and fullest["total"] <= found["limit"]
        assert p["time"]["step"] == step_time(s, m).total
        assert s.layout.micro_batch in p["micro_batches_that_fit"]
        assert s.layout.tp <= m.gpus_per_node and s.layout.sequence_parallel == (s.layout.tp > 1)
        assert s.args.use_distributed_optimizer
    steps = [p["time"]["step"] for p in found["proposals"]]
    assert steps == sorted(steps)


@pytest.mark.parametrize("name", ["moe", "6 experts, MTP", "long", "P with MTP"])
def test_the_search_counts_what_a_run_counts(name):
    """It changes arguments without Megatron's parser; every so many of its layouts are read from their flags."""
    argv, gpus, gib = RUNS[name]
    m = machine(memory=gib * 2**30)
    layouts = list(fit._layouts(read(argv), argv, gpus, m))
    for subject, flags in layouts[:: max(1, len(layouts) // 3)]:
        candidate = fit._least_recomputation(subject, flags, 0.9 * m.memory, argv)
        s = read([*argv, *candidate.flags], gpus)
        assert (s.layout, s.pattern, s.sizes) == (subject.layout, subject.pattern, subject.sizes)
        assert max(row["total"] for row in memory(s)) == candidate.bytes
        assert step_time(s, m) == step_time(candidate.subject, m)


def test_long_contexts_are_spread_over_ranks():
    found, *_ = fitted("long")
    assert any(p["layout"]["cp"] > 1 for p in found["proposals"])
    found, *_ = fitted("3b")
    assert all(p["layout"]["cp"] == 1 for p in found["proposals"])


def test_recomputation_is_proposed_where_memory_is_short():
    plain, *_ = fitted("3b")
    assert not any("recompute" in word for word in plain["proposals"][0]["flags"])
    argv = [*RUNS["3b"][0], "--pipeline-model-parallel-size", "1", "--tensor-model-parallel-size", "4"]
    tight = fit.fit([*argv, "--sequence-parallel", "--micro-batch-size", "4"], 8, machine(memory=30 * 2**30))
    assert tight["tried"] == 1
    assert any("recompute" in word for word in tight["proposals"][0]["flags"])


def test_flags_of_the_command_line_are_kept():
    found, argv, _ = fitted("flags of its own")
    assert {(p["layout"]["tp"], p["layout"]["micro_batch"]) for p in found["proposals"]} == {(2, 2)}
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    for p in found["proposals"]:
        assert given.isdisjoint(p["flags"])
    cut = ["--hybrid-layer-pattern", "M-M-|*-M-", "--pipeline-model-parallel-size", "2", *SMALL]
    found = fit.fit([*cut, "--recompute-granularity", "full", "--recompute-method", "block"], 8, machine(), most=2)
    assert {(p["layout"]["pp"], p["pattern"]) for p in found["proposals"]} == {(2, "M-M-|*-M-")}
    assert not any("recompute" in word for p in found["proposals"] for word in p["flags"])


def test_where_nothing_fits_the_least_is_named():
    argv, gpus = RUNS["3b"][0], 8
    found = fit.fit(argv, gpus, machine(memory=2**30))
    assert found["proposals"] == [] and found["fitting"] == 0 < found["tried"]
    least = found["least"]
    s = read([*argv, *least["flags"]], gpus)
    assert max(row["total"] for row in memory(s)) == least["bytes"] > found["limit"]
    # it fits as soon as there is room for it, and no sooner
    short, enough = (fit.fit(argv, gpus, machine(memory=least["bytes"] / 0.9 * (1 + e)), most=1) for e in (-1e-9, 1e-9))
    assert short["fitting"] == 0 < enough["fitting"]


@pytest.mark.parametrize(
    ("argv", "gpus", "text"),
    [
        (["--recipe", "paper-1b-intra"], 0, "--gpus 0"),
        (["--recipe", "demo"], 8, "--vocab-size"),
        (["--recipe", "paper-1b-intra", "--tensor-model-parallel-size", "3"], 6, "must be a multiple"),
    ],
)
def test_what_no_layout_helps(argv, gpus, text):
    with pytest.raises(ValueError, match=text):
        fit.fit(argv, gpus, machine())
