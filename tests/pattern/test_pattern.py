"""The pattern language, its errors, and the paper's block placements."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import MAX_LAYERS, PatternError, check_pipeline, parse
from megatron_hybrid.placement import PAPER_SETS, PLACEMENTS, attention_blocks, attention_count, from_blocks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/paper_placements.json").read_text())

symbols = st.sampled_from(sorted(LAYERS))
layer_runs = st.lists(symbols, min_size=1, max_size=8).map("".join)
spaces = st.sampled_from(["", " ", "\n", "\t  "])


@st.composite
def grouped(draw, depth=2):
    """A text with groups, and the same text written out by hand."""
    text, plain = "", ""
    for _ in range(draw(st.integers(1, 4))):
        if depth and draw(st.booleans()):
            inner_text, inner_plain = draw(grouped(depth=depth - 1))
            count = draw(st.integers(1, 4))
            text += f"({inner_text}){draw(spaces)}{count}{draw(spaces)}"
            plain += inner_plain * count
        else:
            run = draw(layer_runs) + draw(st.sampled_from(["", "|"]))
            text += run + draw(spaces)
            plain += run
    return text, plain


@given(grouped())
def test_expansion_equals_writing_the_repetitions_out(case):
    text, plain = case
    assert str(parse(text)) == plain


@given(grouped(), layer_runs, st.integers(0, 3))
def test_round_trip_counts_and_layers(case, head, depths):
    text, plain = case
    pattern = parse(text + ("/" + head) * depths)
    assert parse(str(pattern)) == pattern
    assert str(pattern) == plain + ("/" + head) * depths
    assert pattern.layers == plain.replace("|", "")
    assert len(pattern.segments) == plain.count("|") + 1
    assert (pattern.mtp, pattern.mtp_depths) == ((head, depths) if depths else ("", 0))
    everything = plain + head * depths
    assert pattern.counts() == {symbol: everything.count(symbol) for symbol in LAYERS}
    assert sum(pattern.counts().values()) == len(everything.replace("|", ""))
    bare = pattern.without_boundaries()
    assert (bare.layers, bare.mtp, "|" in str(bare)) == (pattern.layers, pattern.mtp, False)


@given(st.text(alphabet="M*WPG-E|/()0123456789 \nDx+", max_size=20))
def test_any_text_is_a_pattern_or_an_error_that_points_into_it(text):
    try:
        pattern = parse(text)
    except PatternError as error:
        assert 1 <= error.position <= max(1, len(text))
        shown, caret = str(error).split("\n")[-2:]
        assert len(shown) == 4 + len(text)
        assert caret == " " * (3 + error.position) + "^"
    else:
        assert parse(str(pattern)) == pattern


@given(layer_runs, st.sampled_from("xyz?#"), layer_runs)
def test_the_error_names_the_character_and_its_place(before, wrong, after):
    with pytest.raises(PatternError) as caught:
        parse(before + wrong + after)
    assert caught.value.position == len(before) + 1
    assert f"'{wrong}' at position {len(before) + 1}" in str(caught.value)


def test_the_caret_stands_under_the_character():
    with pytest.raises(PatternError) as caught:
        parse("M-x*")
    assert str(caught.value).split("\n")[1:] == ["    M-x*", "      ^"]


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 1, "at least one layer"),
        (" | ", 3, "at least one layer"),
        ("/M", 1, "at least one layer"),
        ("M-(M-", 3, "never closed"),
        ("M-)", 3, "has no ("),
        ("M()2", 2, "holds no layer"),
        ("(M-)0", 5, "is 0"),
        ("(M-)00", 5, "is 0"),
        ("M3", 2, "follows no group"),
        ("3M", 1, "follows no group"),
        ("(M-)2 2", 7, "follows no group"),
        (f"(M){MAX_LAYERS + 1}", 1, "lower the count"),
        ("(M)" + "9" * 6000, 1, "lower the count"),
        ("((((M)99)99)99)99", 2, "lower the count"),
        ("M-D", 3, "not wired"),
        ("+", 1, "not wired"),
        ("m-", 1, "did you mean M?"),
        ("M\u00b2", 2, "is not a layer"),
        ("M/", 2, "without layers"),
        ("M/M/", 4, "without layers"),
        ("M/*/M", 4, "must be identical"),
        ("M/M|M", 4, "inside an MTP head"),
    ],
)
def test_what_is_refused(text, position, words):
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert (caught.value.position, words in str(caught.value)) == (position, True), caught.value


def test_empty_segments_are_upstreams_to_allow():
    # A stage that holds only the embedding or the head is a known layout for large vocabularies.
    assert parse("|M-|").segments == ("", "M-", "")


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("P-M-", True),
        ("-*-M-", True),
        ("W-M-", True),
        ("*-W-", False),
        ("P-P-", False),
        ("M-*-", False),
        ("-E", True),
    ],
)
def test_warnings(text, warned):
    assert bool(parse(text).warnings()) is warned


@pytest.mark.parametrize(
    ("text", "pp", "vpp", "segments_per_stage"),
    [("M-*-", 1, None, 1), ("M-*-", 2, None, 1), ("M-|*-", 2, None, 1), ("M-|*-|M|-", 2, 2, 2)],
)
def test_pipeline_layouts_that_fit(text, pp, vpp, segments_per_stage):
    assert check_pipeline(parse(text), pp, vpp) == segments_per_stage


@pytest.mark.parametrize(
    ("text", "pp", "vpp", "remedy"),
    [
        ("M-*", 2, None, r"put 1 \| into"),
        ("M-|*|M", 2, None, r"write 1 \|"),
        ("M-|*-|M|-", 2, 1, r"write 1 \|"),
        ("M-*-", 2, 2, r"put 3 of them"),
        ("M-|*-", 1, None, r"remove the \|"),
        ("M-", 0, None, "at least 1"),
        ("M-*", 4, None, "give at most 3 stages"),
    ],
)
def test_pipeline_layouts_that_do_not_fit(text, pp, vpp, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_pipeline(parse(text), pp, vpp)


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["placements"], ids=lambda r: f"{r['family']} {r['ratio']} {r['placement']}")
def test_placements_are_the_papers(row):
    found = attention_blocks(row["num_blocks"], row["ratio"], row["placement"])
    assert found == row["blocks"]


@pytest.mark.parametrize("row", GOLDEN["counts"], ids=lambda r: f"{r['family']} {r['ratio']}")
def test_counts_are_the_papers(row):
    assert attention_count(row["num_blocks"], row["ratio"]) == row["attention"]


def test_the_table_of_exceptions_holds_only_published_sets():
    published = {
        (row["num_blocks"], len(row["blocks"]), row["placement"]): tuple(row["blocks"]) for row in GOLDEN["placements"]
    }
    assert PAPER_SETS.items() <= published.items()


@given(
    st.integers(2, 120),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(PLACEMENTS),
    st.sampled_from(["dense", "moe", "none"]),
)
def test_every_size_ratio_and_placement_gives_a_sound_pattern(blocks, a, b, placement, ffn):
    if a == b == 0:
        return
    ratio = f"{a}:{b}"
    chosen = attention_blocks(blocks, ratio, placement)
    count = attention_count(blocks, ratio)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    assert all(1 <= i <= blocks for i in chosen)
    assert (count > 0, count < blocks) == (a > 0, b > 0)
    pattern = from_blocks(blocks, ratio, placement, "*:M", ffn)
    assert parse(str(pattern)) == pattern
    mixers = [c for c in pattern.layers if LAYERS[c].kind == "mixer"]
    assert [i for i, c in enumerate(mixers, 1) if c == "*"] == chosen
    assert len(pattern.layers) == blocks * (1 if ffn == "none" else 2)


def test_the_papers_model_in_full():
    expected = "M-M-M-M-P-M-M-M-P-M-M-M-M-"  # 13 blocks, intra-layer hybrids at 5 and 9
    assert str(from_blocks(13, "1:5")) == expected
    assert str(from_blocks(4, "1:1", "end", "*:W", "moe")) == "WE*EWE*E"
    assert str(from_blocks(3, "0:1", ffn="none")) == "MMM"
    assert str(from_blocks(2, "1:0", mixers="*:M")) == "*-*-"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((13, "1:5:2"), "two whole numbers"),
        ((13, "-1:5"), "two whole numbers"),
        ((13, "0:0"), "has no block"),
        ((1, "1:5"), "at least 2"),
        ((0, "1:0"), "at least 1"),
        ((13, "1:5", "centre"), "use one of scatter"),
        ((13, "1:5", "middle", "PM"), "such as P:M"),
        ((13, "1:5", "middle", "P:-"), "such as P:M"),
        ((13, "1:5", "middle", "P:M", "gelu"), "use one of dense"),
    ],
)
def test_block_values_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        from_blocks(*arguments)


def test_import_needs_neither_torch_nor_megatron():
    code = (
        "import sys\n"
        "from megatron_hybrid import costs, pattern\n"
        "from megatron_hybrid.cli import config, recipes\n"
        "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
