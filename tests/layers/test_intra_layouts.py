"""P layers of every preset in every kind of layout: same numbers, same checkpoints, no more communication than said."""

import math
from typing import Any

import pytest
import torch

from tests.checkpoint.test_reshard import same
from tests.model.test_layouts import CP2, DP, PP2, RTOL, SP, TP2
from tests.support.training import Run, continued, folder, losses, trained

# What the ranks run ---------------------------------------------------------------------------------

KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_": "all_gather of a list",
}


def of_one_layer(symbol: str, flags: str) -> dict[str, int]:
    """Calls of process groups in one layer's forward and backward pass by kind, and the elements of all-reduces."""
    run = Run(symbol, flags)
    layer = run.model[0].module.decoder.layers[0].train()
    x = torch.randn(16, 1, run.args.hidden_size, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = layer(hidden_states=x, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.randn_like(y))
    found: dict[str, int] = {}
    last = ""
    for event in profile.events():
        if event.name.startswith("c10d::"):
            last = KINDS[event.name]
            found[last] = found.get(last, 0) + 1
        elif event.name == "gloo:all_reduce" and last == "all_reduce":
            found["all_reduce elements"] = found.get("all_reduce elements", 0) + math.prod(event.input_shapes[0])
    return found


def alphas(pattern: str, flags: str, load: str) -> dict[str, float]:
    """The logged mean weight of the second branch, after two steps from saved weights."""
    from megatron_hybrid.layers.intra.fusion import mean_alphas

    run = Run(pattern, f"--load {load} --no-load-optim --no-load-rng --finetune {flags}")
    for _ in range(2):
        run.step()
    found = mean_alphas(run.model)["intra_alpha"]
    assert mean_alphas(run.model)["intra_alpha"] == {}  # counted once
    return found


def shared_parameters(pattern: str, flags: str, steps: int) -> dict[str, Any]:
    """Parameters that ranks have in common, freshly initialised and after some steps."""
    run = Run(pattern, flags)
    marked = {n for chunk in run.model for n, p in chunk.named_parameters() if getattr(p, "sequence_parallel", False)}
    found = {f"fresh {n}": v for n, v in run.parameters().items() if n.split(".", 1)[1] in marked}
    for _ in range(steps):
        run.step()
    return found | {n: v for n, v in run.parameters().items() if n.split(".", 1)[1] in marked}


# Tests ----------------------------------------------------------------------------------------------

TP4 = "--tensor-model-parallel-size 4"
ONE_GROUP = "--mamba-num-groups 1 --intra-num-query-groups 1"
"""Fewer groups of B and C, and key heads, than ranks: they share rows."""

MODELS = {
    "paper": "",
    "hymba": "--intra-preset hymba",
    "falcon-h1": "--intra-preset falcon-h1",
    "diff-transformer": "--intra-preset diff-transformer",
    "diff-mamba": "--intra-preset diff-mamba",
    "one group": ONE_GROUP,
    # every parameter that ranks have in common: gate, scalars or lambda; norm groups that span ranks
    "interpolate": f"{ONE_GROUP} --intra-scale interpolate --intra-fusion add --intra-norm-groups 1",
    "gate": f"{ONE_GROUP} --intra-scale gate --intra-norm fused --intra-norm-groups 1 --intra-output joint "
    "--intra-value shared --intra-fusion add",
    "scalar": f"--intra-preset diff-mamba --intra-scale scalar --intra-value shared {ONE_GROUP}",
    "window": "--intra-window 7 --intra-sinks 2",
}
LAYOUTS = {
    "tp2-sp": (2, "P-P-", f"{TP2} {SP} {DP}"),
    "tp2": (2, "P-P-", f"{TP2} {DP}"),
    "tp4-sp": (4, "P-P-", f"{TP4} {SP} {DP}"),
    "cp2": (2, "P-P-", f"{CP2} {DP}"),
    "pp2": (2, "P-|P-", f"{PP2} {DP}"),
    "tp2-sp-cp2": (4, "P-P-", f"{TP2} {SP} {CP2} {DP}"),
}
PRESETS = list(MODELS)[:5]
CASES = [(model, layout) for model in PRESETS for layout in ("tp2-sp", "cp2", "pp2")]
CASES += [("one group", "tp2"), ("one group", "tp4-sp"), ("one group", "tp2-sp-cp2"), ("interpolate", "tp4-sp")]
CASES += [("gate", "tp2"), ("scalar", "tp2"), ("diff-transformer", "tp2"), ("window", "cp2")]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_equals_one_process(ranks, reference, model, layout):
    where, expected = reference("P-P-", MODELS[model])
    size, pattern, flags = LAYOUTS[layout]
    for found in ranks(size).run(losses, pattern=pattern, load=where, flags=f"{MODELS[model]} {flags}"):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=RTOL)


@pytest.mark.parametrize("layout", ["tp2", "tp4-sp"])
def test_mamba_layers_run_on_more_ranks_than_they_have_groups(ranks, reference, layout):
    flags = "--mamba-num-groups 1"
    where, expected = reference("M-M-", flags)
    size, _, parallel = LAYOUTS[layout]
    for found in ranks(size).run(losses, pattern="M-M-", load=where, flags=f"{flags} {parallel}"):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=RTOL)


@pytest.mark.parametrize("model", [*PRESETS, "gate"])
def test_checkpoint_is_resharded_and_comes_back(ranks, tmp_path, model):
    """One process, four ranks that share rows, one process: weights and moments to the bit, the same next step."""
    pattern, flags = ("M-P-" if model == "paper" else "P-"), f"{MODELS[model]} {ONE_GROUP} {DP}"
    one, four = folder(tmp_path / "one"), folder(tmp_path / "four")
    expected = ranks(1).run(trained, pattern=pattern, flags=flags, save=one, before=1, after=1)[0]
    for result in ranks(4).run(continued, pattern=pattern, flags=f"{flags} {TP4} {SP}", load=one, save=four, steps=1):
        assert result["steps"][0] == pytest.approx(expected["steps"][1], rel=RTOL)
    back = ranks(1).run(continued, pattern=pattern, flags=flags, load=four, steps=1)[0]
    assert same(back["parameters"], expected["parameters"]) == []
    assert same(back["optimizer"], expected["optimizer"]) == []
    assert back["steps"] == expected["steps"][1:]


def test_checkpoint_of_two_ranks_loads_on_four(ranks, tmp_path):
    two, flags = folder(tmp_path), f"{ONE_GROUP} {DP}"
    # two groups of states and two key heads on two ranks are whole; four ranks share them
    flags = flags.replace("groups 1", "groups 2")
    (expected, _) = ranks(2).run(trained, pattern="M-P-", flags=f"{flags} {TP2} {SP}", save=two, before=1, after=1)
    for result in ranks(4).run(continued, pattern="M-P-", flags=f"{flags} {TP4} {SP}", load=two, steps=1):
        assert result["steps"][0] == pytest.approx(expected["steps"][1], rel=RTOL)


@pytest.mark.parametrize("scale", ["diff-lambda", "scalar"])
def test_what_ranks_have_in_common_is_equal_from_the_start_and_stays_so(ranks, scale):
    flags = f"{ONE_GROUP} {TP4} {SP} {DP} --intra-scale {scale}"
    by_rank = ranks(4).run(shared_parameters, pattern="P-M-", flags=flags, steps=2)
    ends = {name.rsplit(".", 1)[-1] for name in by_rank[0]}
    own = "lambdas" if scale == "diff-lambda" else "scalars"
    assert ends == {"shared_rows", "conv1d_shared_weight", "conv1d_shared_bias", own, "weight"}  # the last is of norms
    for rank in by_rank[1:]:
        assert all(torch.equal(rank[name], value) for name, value in by_rank[0].items())
    changed = [name for name, value in by_rank[0].items() if not name.startswith("fresh")
               and not torch.equal(value, by_rank[0][f"fresh {name}"])]  # fmt: skip
    assert len(changed) == len(by_rank[0]) / 2


@pytest.mark.parametrize("recompute", ["", "--hybrid-recompute intra"])
def test_mean_alpha_is_that_of_all_tokens_and_layers(ranks, reference, recompute):
    where, _ = reference("P-P-", MODELS["interpolate"])
    flags = f"{MODELS['interpolate']} {DP} {recompute}"
    (expected,) = ranks(1).run(alphas, pattern="P-P-", flags=flags, load=where)
    assert set(expected) == {"1", "3"} and all(0.2 < value < 0.8 for value in expected.values())
    assert expected["1"] != expected["3"]
    for layout in (("P-|P-", PP2), ("P-P-", f"{TP2} {SP}"), ("P-P-", CP2), ("P-P-", "")):
        for found in ranks(2).run(alphas, pattern=layout[0], flags=f"{flags} {layout[1]}", load=where):
            assert found == pytest.approx(expected, rel=RTOL), layout


# Communication -----------------------------------------------------------------------------------


def counted(ranks, symbol: str, flags: str) -> dict:
    (first, second) = ranks(2).run(of_one_layer, symbol=symbol, flags=f"{TP2} {SP} {flags}")
    assert first == second
    return first


def test_a_fused_layer_communicates_like_one_attention_layer(ranks):
    attention = counted(ranks, "*", "")
    assert attention["all_gather"] >= 2  # forward, and backward for the weight's gradient
    for preset in PRESETS:
        assert counted(ranks, "P", f"--intra-preset {preset}") == attention, preset
    # what ranks share goes through the same gather, and is summed once a step
    assert counted(ranks, "P", f"{ONE_GROUP} --intra-scale gate") == attention
    assert counted(ranks, "P", f"{ONE_GROUP} --intra-scale diff-lambda") == attention
    two_mixers = {name: count + counted(ranks, "M", "").get(name, 0) for name, count in attention.items()}
    assert two_mixers["all_gather"] == 2 * attention["all_gather"]


def test_norm_groups_that_span_ranks_cost_one_small_reduction_each_way(ranks):
    attention = counted(ranks, "*", "")
    spanning = counted(ranks, "P", "--intra-norm-groups 1")
    s, b = 32, 1
    assert spanning.pop("all_reduce") == attention.pop("all_reduce", 0) + 2
    assert spanning.pop("all_reduce elements") == attention.pop("all_reduce elements", 0) + 2 * s * b * 2
    assert spanning == attention
