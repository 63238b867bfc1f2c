"""Architectures side by side."""

import pytest

from megatron_hybrid import costs
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan import comparison
from megatron_hybrid.plan.subject import Where, read
from tests.plan.support import PAPER, SMALL, small


def compared(words, match=None, flags=(), convention="paper"):
    found = comparison.subjects(words, flags, Where())
    return comparison.compare(found, match, convention)["architectures"]


def test_equal_flops_are_the_papers_tokens():
    """Bae et al., arXiv:2510.04800, table 2: 60, 71, 73, 73 and 72 billion tokens on 4.470e20 FLOPs."""
    rows = compared(PAPER, "flops")
    assert [round(row["tokens"] / 1e9) for row in rows] == [60, 71, 73, 73, 72]
    assert [f"{row['flops']['paper']['run']:.3e}" for row in rows] == ["4.470e+20"] * 5
    assert [row["iterations"] for row in rows] == [round(row["tokens"] / (256 * 8192)) for row in rows]


def test_flops_are_matched_in_the_convention_that_is_asked_for():
    rows = compared(PAPER[:2], "flops", convention="model")
    runs = [row["flops"]["model"]["run"] for row in rows]
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)
    assert rows[0]["flops"]["paper"]["run"] != pytest.approx(rows[1]["flops"]["paper"]["run"], rel=1e-3)


def test_equal_parameters_are_the_papers_blocks():
    """The blocks of the paper's 1B models (its table 8), from whatever number the command line has."""
    rows = compared(PAPER, "parameters", ["--num-blocks", "16"])
    mixers = [sum(LAYERS[c].kind == "mixer" for c in row["pattern"]) for row in rows]
    assert mixers == [16, 16, 13, 13, 13]
    assert {row["tokens"] for row in rows} == {rows[0]["tokens"]}
    assert [row["name"] for row in rows] == PAPER
    nearest = abs(rows[4]["parameters"]["active_non_embedding"] - rows[0]["parameters"]["active_non_embedding"])
    for blocks in ("12", "14"):
        other = read(["--recipe", PAPER[4], "--num-blocks", blocks])
        distance = costs.model_parameters(other.pattern, other.sizes).active_non_embedding
        assert abs(distance - rows[0]["parameters"]["active_non_embedding"]) > nearest


def test_patterns_are_compared_in_the_sizes_of_the_command_line():
    rows = compared(["M-M-M-", "*-M-*-"], flags=SMALL)
    assert [row["name"] for row in rows] == ["M-M-M-", "*-M-*-"]
    assert [row["pattern"] for row in rows] == ["M-M-M-", "*-M-*-"]
    s = small("M-M-M-")
    assert rows[0]["parameters"]["total"] == costs.model_parameters(s.pattern, s.sizes).total
    assert [row["tokens"] for row in rows] == [None, None]


def test_patterns_beside_a_recipe_have_names_of_their_own():
    assert [row["name"] for row in compared(["M-M-", "*-*-"], flags=["--recipe", PAPER[4]])] == ["M-M-", "*-*-"]
    assert [row["name"] for row in compared(PAPER[:2], flags=["--recipe", PAPER[4]])] == PAPER[:2]


@pytest.mark.parametrize(
    ("words", "match", "text"),
    [
        (PAPER[:1], None, "takes two or more architectures"),
        (["M-M-", "*-*-"], "flops", "needs the length of M-M-, its reference: give --train-iters"),
        ([PAPER[0], "M-M-"], "parameters", "M-M- is an explicit pattern"),
        ([PAPER[0], "paper-1b-itra"], None, "did you mean paper-1b-intra"),
        ([PAPER[0], "M-M-|*"], None, "M-M-|*: "),
    ],
)
def test_what_cannot_be_compared(words, match, text):
    flags = SMALL if words[0] == "M-M-" else ["--recipe", PAPER[0]]
    with pytest.raises(ValueError) as caught:
        compared(words, match, flags)
    assert text in str(caught.value)
