"""What the figures of a plan add up to."""

import json

import pytest

from megatron_hybrid import costs
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan.figures import figures
from tests.plan.support import DEMO, SMALL, machine, planned

EVERY_KIND = [
    DEMO,
    "--recipe paper-1b-intra",
    "--recipe paper-1b-swa",
    "--recipe paper-1b-intra-moe --expert-model-parallel-size 4",
    "--recipe paper-1b-intra-diff-transformer",
    "--recipe paper-3b-inter --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    " ".join(["--hybrid-layer-pattern WMPG-*E/ME/ME --num-experts 6", *SMALL]),
    " ".join(["--hybrid-layer-pattern GE/*-/*- --num-experts 8 --mtp-use-repeated-layer", *SMALL]),
    " ".join(["--hybrid-layer-pattern M-*- --untie-embeddings-and-output-weights", *SMALL]),
]


@pytest.mark.parametrize("line", EVERY_KIND)
def test_parts_add_up_to_the_model(line):
    s = planned(line)
    f = figures(s, machine())
    assert json.loads(json.dumps(f, allow_nan=False)) == f
    model = costs.model_parameters(s.pattern, s.sizes)
    for name, whole in (("parameters", model.total), ("active", model.active)):
        assert sum(part[name] for part in f["parts"]) == whole
    assert f["parameters"] == {name: getattr(model, name) for name in f["parameters"]}
    flops = costs.training_flops_per_token(s.pattern, s.sizes)
    # sums of the same floats in another order
    assert sum(part["training_flops_per_token"] for part in f["parts"]) == pytest.approx(flops, rel=1e-12)
    assert [part["symbol"] for part in f["parts"] if part["symbol"] in LAYERS] == [
        symbol for symbol in LAYERS if symbol in s.pattern.layers
    ]


@pytest.mark.parametrize("line", EVERY_KIND)
def test_figures_are_those_of_costs(line):
    s = planned(line)
    f = figures(s)
    for convention in ("model", "paper"):
        per_token = costs.training_flops_per_token(s.pattern, s.sizes, convention)
        found = f["flops"][convention]
        assert found["per_token"] == per_token
        assert found["per_sample"] == costs.training_flops(s.pattern, s.sizes, 1, convention)
        assert found["run"] == (per_token * s.tokens if s.tokens else None)
    cache = f["cache"]
    assert cache["total"] == [costs.model_cache(s.pattern, s.sizes, n).size() for n in cache["lengths"]]
    assert [sum(column) for column in zip(*cache["layers"].values(), strict=True)] == cache["total"]
    storage, settings = costs.Storage.from_args(s.args), costs.ActivationSettings.from_args(s.args)
    assert len(f["memory"]) == s.layout.pp
    for stage, row in enumerate(f["memory"]):
        held = costs.rank_memory(s.pattern, s.sizes, s.layout, storage, stage)
        kept = costs.stage_activation_bytes(s.pattern, s.sizes, s.layout, settings, stage)
        assert row["total"] == held.total + kept == sum(v for k, v in row.items() if k != "total")
    work = costs.stage_work(s.pattern, s.sizes, s.layout.pp)
    assert [stage["share"] for stage in f["pipeline"]["stages"]] == [w / sum(work) for w in work]
    assert "".join(stage["layers"] for stage in f["pipeline"]["stages"]).replace("|", "") == s.pattern.layers
    assert "time" not in f
    sent = [
        costs.step_communication(s.pattern, s.sizes, s.layout, CommunicationSettings.from_args(s.args), stage)
        for stage in range(s.layout.pp)
    ]
    bytes_sent = sum(traffic["bytes"] for traffic in f["communication"].values())
    assert bytes_sent == pytest.approx(max(sum(t.bytes for t in by_group.values()) for by_group in sent))
