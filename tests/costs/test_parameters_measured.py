"""Parameters of models that are really built, without memory, against the counted ones and the published ones."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hybrid import costs
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import parse
from tests.costs.test_costs import distinct_models
from tests.layers.test_intra_module import ALLOWED
from tests.support.single import build, same_groups

# What the ranks run ---------------------------------------------------------------------------------


def parameters(argv: list[str]) -> dict[str, int]:
    """Parameters of the model of a command line, built without memory, and what costs/ counts.

    Returns:
        ``built`` and ``built_embedding`` (embedding and an untied output head), summed over the model's own
        tensors; ``allocated``, those of them that take memory; ``total``, ``embedding`` and ``active`` as counted.
    """
    model, args = build(argv, on_meta=True)
    counts = costs.model_parameters(parse(args.hybrid_layer_pattern), costs.sizes_of(args))
    built = dict(model.named_parameters())
    outer = ("embedding.", "output_layer.")
    return {
        "built": sum(p.numel() for p in built.values()),
        "built_embedding": sum(p.numel() for name, p in built.items() if name.startswith(outer)),
        "allocated": sum(p.numel() for p in built.values() if not p.is_meta),
        "total": counts.total,
        "embedding": counts.embedding,
        "active": counts.active,
    }


def parameters_of_all(commands: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """:func:`parameters` of many command lines by name."""
    with same_groups():
        return {name: parameters(argv) for name, argv in commands.items()}


# Tests ----------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/paper_costs.json").read_text())
ONE_PROCESS = {"demo": "--expert-model-parallel-size 1 --vocab-size 2000"}
"""The demo is for two processes, and leaves the vocabulary to the tokenizer."""
PRINTED = {row["recipe"] for table in ("table_4", "table_8", "table_9", "table_10") for row in GOLDEN[table]}
NAMES = ["demo", *(name for name in distinct_models() if name in PRINTED or not name.startswith("paper-350m-"))]
"""Of the designs of P those at 1B: those at 350M differ from them in numbers alone."""


@pytest.fixture(scope="module")
def built(ranks):
    """``built(name)``: :func:`parameters` of a recipe."""
    known: dict[str, dict[str, int]] = {}

    def of(name: str) -> dict[str, int]:
        if name not in known:  # with those behind it: most of the time goes into process groups
            some = [n for n in NAMES[NAMES.index(name) :] if n not in known][:12]
            commands = {n: ["--recipe", n, *ONE_PROCESS.get(n, "").split()] for n in some}
            known.update(ranks(1).run(parameters_of_all, commands=commands)[0])
        return known[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_the_parameters_that_are_counted(built, name):
    found = built(name)
    assert found["allocated"] == 0
    assert (found["built"], found["built_embedding"]) == (found["total"], found["embedding"])


def published() -> list[tuple[str, str, float]]:
    """Recipe, table and non-embedding parameters in billions; active ones have no model to count in."""
    rows = [(r["recipe"], "table 8", r["non_embedding"]) for r in GOLDEN["table_8"]]
    rows += [(r["recipe"], "table 9", r["non_embedding"]) for r in GOLDEN["table_9"]]
    unreachable = {name for name, *_ in GOLDEN["table_10_unreachable"]["non_embedding"]}
    rows += [
        (r["recipe"], "table 10", r["non_embedding"]) for r in GOLDEN["table_10"] if r["recipe"] not in unreachable
    ]
    return rows + [(r["recipe"], "table 4", r["total"]) for r in GOLDEN["table_4"]]


@pytest.mark.parametrize(("name", "table", "printed"), published(), ids=lambda v: str(v).replace(" ", "-"))
def test_recipe_has_the_published_size(built, name, table, printed):
    found = built(name)
    non_embedding = (found["built"] - found["built_embedding"]) / 1e9
    # within 2%, or half of the last printed digit
    assert abs(non_embedding - printed) <= max(0.02 * printed, 0.005), table


@st.composite
def models(draw) -> list[str]:
    """Flags of a random pattern of all layers with sizes that divide where they must and are odd elsewhere."""

    def whole(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    # argparse of early releases of Python 3.12 drops a value of two dashes
    pattern = draw(st.text("M*WPEG-", min_size=1, max_size=9).filter(lambda text: text != "--"))
    pattern += draw(st.sampled_from(["", "", "/M-", "/*E", "/M", "/P-/P-"]))
    groups, intra_groups, states, head, delta = whole(1, 3), whole(1, 3), whole(1, 3), whole(1, 9), whole(1, 3)
    heads, intra_heads = groups * whole(1, 3), intra_groups * whole(1, 3)
    flags = {
        "hidden-size": heads * whole(3, 19),
        "num-attention-heads": heads,
        "num-query-groups": groups,
        "kv-channels": 2 * whole(1, 7),
        "ffn-hidden-size": whole(5, 77),
        "mamba-num-groups": states,
        "mamba-num-heads": states * whole(1, 5),
        "mamba-head-dim": head,
        "mamba-state-dim": whole(1, 17),
        "intra-num-attention-heads": intra_heads,
        "intra-num-query-groups": intra_groups,
        "intra-qk-dim": intra_heads * 2 * whole(1, 5),
        "intra-value-dim": intra_heads * whole(1, 13),
        "intra-ssm-dim": states * whole(1, 5) * head,
        "linear-num-key-heads": delta,
        "linear-num-value-heads": delta * whole(1, 3),
        "linear-key-head-dim": whole(1, 13),
        "linear-value-head-dim": whole(1, 13),
        "vocab-size": whole(1, 999),
        "seq-length": 32,
        "max-position-embeddings": 32,
        "normalization": "RMSNorm",
    }
    optional = ["swiglu", "untie-embeddings-and-output-weights", "disable-bias-linear"]
    switches = {"group-query-attention", *draw(st.sets(st.sampled_from(optional)))}
    if "E" in pattern:
        experts = whole(1, 5)
        flags |= {"num-experts": experts, "moe-router-topk": whole(1, experts)}
        flags |= {"moe-router-score-function": "sigmoid"}
        flags |= {"moe-ffn-hidden-size": whole(3, 33)} if draw(st.booleans()) else {}
        switches.add("disable-bias-linear")  # the experts have none
        if draw(st.booleans()):
            flags["moe-shared-expert-intermediate-size"] = whole(3, 33)
    if "P" in pattern:
        switches.add("disable-bias-linear")  # P has no biases
        point = draw(st.sampled_from(ALLOWED))
        flags |= {f"intra-{axis}": value for axis, value in point.items()}
        flags["intra-branches"] = ",".join(point["branches"])
        # joint outputs and shared values want branches of one width
        flags["intra-value-dim"] = flags["intra-ssm-dim"] = math.lcm(intra_heads, states * head) * whole(1, 3)
    argv = [f"--{name}={value}" for name, value in flags.items()] + [f"--{name}" for name in sorted(switches)]
    argv += ["--position-embedding-type=rope", "--micro-batch-size=1", "--train-iters=1", "--lr=1e-3"]
    return [*argv, f"--hybrid-layer-pattern={pattern}"]


def check_random_models(number: int) -> tuple[int, set[str]]:
    """In a rank, since each call from outside makes process groups; how many models were checked, of which layers."""
    seen: list[str] = []

    @settings(max_examples=number, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(models())
    def check(argv: list[str]) -> None:
        found = parameters(argv)
        assert (found["built"], found["built_embedding"]) == (found["total"], found["embedding"])
        seen.append(argv[-1].partition("=")[2])

    with same_groups():
        check()
    return len(seen), set("".join(seen))


def test_a_hundred_random_models_have_the_parameters_that_are_counted(ranks):
    [(number, symbols)] = ranks(1).run(check_random_models, number=100)
    assert number >= 100
    assert symbols == {*LAYERS, "/"}
