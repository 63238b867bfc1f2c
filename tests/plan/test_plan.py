"""Plans from end to end: what first users met."""

import pytest

from megatron_hybrid.cli.recipes import flags_to_argv, recipe
from megatron_hybrid.costs.hardware import gpu
from megatron_hybrid.plan import comparison, fit, tables
from megatron_hybrid.plan.figures import figures
from megatron_hybrid.plan.subject import Where
from megatron_hybrid.plan.time import Machine, step_time
from tests.plan.support import machine, planned, printed, small


def test_a_plan_says_whether_it_fits():
    line = "--recipe paper-3b-llama --micro-batch-size 1"
    roomy, tight = (figures(planned(line, 64), machine(memory=gib * 2**30)) for gib in (80, 40))
    assert "Fits: " in printed(tables.show, roomy)
    assert "DOES NOT FIT: 39.9" in printed(tables.show, tight)
    assert tight["machine"]["limit"] == 0.9 * 40 * 2**30


def test_architectures_that_do_not_fit_have_no_time():
    found = comparison.subjects(["paper-3b-llama", "paper-1b-llama"], [], Where(64))
    text = printed(tables.show_comparison, comparison.compare(found, None, machine=machine(memory=40 * 2**30)))
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("paper-")}
    assert "does not fit" in rows["paper-3b-llama"] and "does not fit" not in rows["paper-1b-llama"]
    assert "times on 64 x " in text


def test_layouts_of_a_given_number_of_stages_are_cut_by_work():
    argv = ["--recipe", "paper-1b-intra", "--pipeline-model-parallel-size", "4"]  # 26 layers do not divide by 4
    found = fit.fit(argv, 64, machine(), most=3)["proposals"]
    assert found
    for proposal in found:
        assert proposal["layout"]["pp"] == 4
        assert "--balance-pipeline" in proposal["flags"]
        assert "--pipeline-model-parallel-size" not in proposal["flags"]


def test_a_model_without_a_recipe_needs_no_micro_batch_to_be_fitted():
    flags = recipe("paper-1b-inter").flags
    kept = {flag: value for flag, value in flags.items() if flag != "--micro-batch-size"}
    found = fit.fit(flags_to_argv(kept), 8, machine(), most=1)["proposals"]
    assert found[0]["micro_batches_that_fit"][0] == 1 and len(found[0]["micro_batches_that_fit"]) > 1


def test_parameters_are_matched_without_a_length():
    found = comparison.subjects(["paper-1b-llama", "paper-1b-mamba"], ["--train-iters", "0"], Where())
    rows = comparison.compare(found, "parameters")["architectures"]
    assert [row["tokens"] for row in rows] == [None, None]


def test_heads_are_counted_one_by_one_and_stand_on_the_last_stage():
    f = figures(small("M-*-|M-*-/*-/*-", "--pipeline-model-parallel-size 2", 2))
    (heads,) = [part for part in f["parts"] if part["symbol"] == "/"]
    assert heads["count"] == 2 and heads["parameters"] == 2 * heads["parameters_each"]
    assert [stage["beside"] for stage in f["pipeline"]["stages"]] == [["embedding"], ["2 x /*-", "output head"]]


def test_links_beyond_a_bridge_are_the_networks():
    bridged = Machine.of(gpu("a100-pcie-80gb"), "bf16")
    assert bridged.nvlink_gpus == 2
    argv = "--recipe paper-1b-inter --tensor-model-parallel-size"
    times = [step_time(planned(f"{argv} {tp} --sequence-parallel", 8), bridged).messages for tp in (2, 4)]
    slow = Machine.of(gpu("a100-pcie-80gb"), "bf16", network=1e9)
    assert step_time(planned(f"{argv} 2 --sequence-parallel", 8), slow).messages == times[0]
    assert step_time(planned(f"{argv} 4 --sequence-parallel", 8), slow).messages > 10 * times[1]
    given = Machine.of(gpu("a100-pcie-80gb"), "bf16", nvlink=3e11, network=1e9)
    assert step_time(planned(f"{argv} 4 --sequence-parallel", 8), given).messages < times[1]


def test_the_bubble_of_a_plan():
    assert figures(small("M-*-", "", 1))["pipeline"]["bubble"] == pytest.approx(0, abs=1e-12)
    f = figures(small("M-|*-", "--pipeline-model-parallel-size 2 --global-batch-size 1", 2))
    # one micro-batch: each of two stages waits while the other works, whatever their shares
    assert f["pipeline"]["bubble"] == pytest.approx(0.5, rel=1e-12)
    assert "stages wait 50.0% of a step's time" in printed(tables.show, f)
