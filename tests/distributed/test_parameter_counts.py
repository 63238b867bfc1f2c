"""Parameters of models that are really built (without memory) against costs.py and against the published counts."""

import json
import math
import random
from pathlib import Path

import pytest

from megatron_hybrid.recipes import recipes
from tests.distributed import single
from tests.distributed.test_design_space import ALLOWED

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/paper_costs.json").read_text())
ONE_PROCESS = {"demo": "--expert-model-parallel-size 1 --vocab-size 2000"}
"""The demo is for two processes, and leaves the vocabulary to the tokenizer."""


@pytest.fixture(scope="module")
def built(ranks):
    """``built(name)``: what single.parameters says of a recipe."""
    known: dict[str, dict[str, int]] = {}

    def of(name: str) -> dict[str, int]:
        if name not in known:
            argv = ["--recipe", name, *ONE_PROCESS.get(name, "").split()]
            known[name] = ranks(1).run(single.parameters, argv=argv)[0]
        return known[name]

    return of


@pytest.mark.parametrize("name", [r.name for r in recipes()])
def test_recipe_has_the_parameters_that_are_counted(built, name):
    found = built(name)
    assert found["allocated"] == 0
    assert (found["built"], found["built_embedding"]) == (found["total"], found["embedding"])


def published() -> list[tuple[str, str, float]]:
    """Recipe, table and non-embedding parameters in billions; active ones have no model to count in."""
    rows = [(r["recipe"], "table 8", r["non_embedding"]) for r in GOLDEN["table_8"]]
    rows += [(r["recipe"], "table 9", r["non_embedding"]) for r in GOLDEN["table_9"]]
    return rows + [(r["recipe"], "table 4", r["total"]) for r in GOLDEN["table_4"]]


@pytest.mark.parametrize(("name", "table", "printed"), published(), ids=lambda v: str(v).replace(" ", "-"))
def test_recipe_has_the_published_size(built, name, table, printed):
    found = built(name)
    non_embedding = (found["built"] - found["built_embedding"]) / 1e9
    # within 2%, or half of the last printed digit
    assert abs(non_embedding - printed) <= max(0.02 * printed, 0.005), table


def random_model(seed: int) -> list[str]:
    """Flags of a random pattern of all layers with sizes that divide where they must and are odd elsewhere."""
    draw = random.Random(seed)
    pattern = "".join(draw.choices("M*WPP-EG", k=draw.randint(1, 9)))
    if draw.random() < 0.3:
        pattern += "/" + draw.choice(["M-", "*E", "M"])
    groups, share, width = draw.randint(1, 3), draw.randint(1, 3), 2 * draw.randint(1, 7)
    intra_groups, intra_share = draw.randint(1, 3), draw.randint(1, 3)
    intra_heads, head, states = intra_groups * intra_share, draw.randint(1, 9), draw.randint(1, 3)
    delta = draw.randint(1, 3)
    flags = {
        "hidden-size": groups * share * draw.randint(3, 19),
        "num-attention-heads": groups * share,
        "num-query-groups": groups,
        "kv-channels": width,
        "ffn-hidden-size": draw.randint(5, 77),
        "mamba-num-groups": states,
        "mamba-num-heads": states * draw.randint(1, 5),
        "mamba-head-dim": head,
        "mamba-state-dim": draw.randint(1, 17),
        "intra-num-attention-heads": intra_heads,
        "intra-num-query-groups": intra_groups,
        "intra-qk-dim": intra_heads * 2 * draw.randint(1, 5),
        "intra-value-dim": intra_heads * draw.randint(1, 13),
        "intra-ssm-dim": states * draw.randint(1, 5) * head,
        "linear-num-key-heads": delta,
        "linear-num-value-heads": delta * draw.randint(1, 3),
        "linear-key-head-dim": draw.randint(1, 13),
        "linear-value-head-dim": draw.randint(1, 13),
        "vocab-size": draw.randint(1, 999),
        "seq-length": 32,
        "max-position-embeddings": 32,
    }
    switches = ["group-query-attention", "disable-bias-linear", *(["swiglu"] if draw.random() < 0.7 else [])]
    switches += ["untie-embeddings-and-output-weights"] if draw.random() < 0.5 else []
    if "E" in pattern:
        experts = draw.randint(1, 5)
        flags |= {"num-experts": experts, "moe-router-topk": draw.randint(1, experts)}
        flags |= {"moe-router-score-function": "sigmoid"}
        flags |= {"moe-ffn-hidden-size": draw.randint(3, 33)} if draw.random() < 0.7 else {}
        flags |= {"moe-shared-expert-intermediate-size": draw.randint(3, 33)} if draw.random() < 0.5 else {}
    if "P" in pattern:
        point = draw.choice(ALLOWED)
        flags |= {f"intra-{axis}": value for axis, value in point.items()}
        flags["intra-branches"] = ",".join(point["branches"])
        # joint outputs and shared values want branches of one width
        flags["intra-value-dim"] = flags["intra-ssm-dim"] = math.lcm(intra_heads, states * head) * draw.randint(1, 3)
    argv = [f"--{name}={value}" for name, value in flags.items()] + [f"--{name}" for name in switches]
    argv += ["--normalization=RMSNorm", "--position-embedding-type=rope"]
    return [*argv, "--micro-batch-size=1", "--train-iters=1", "--lr=1e-3", f"--hybrid-layer-pattern={pattern}"]


@pytest.mark.parametrize("seed", range(24))
def test_random_models_have_the_parameters_that_are_counted(ranks, seed):
    argv = random_model(seed)
    found = ranks(1).run(single.parameters, argv=argv)[0]
    assert (found["built"], found["built_embedding"]) == (found["total"], found["embedding"]), argv
