"""Recipes: their flags are real, the user's flags win, and names are forgiving."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.cli import report
from megatron_hybrid.cli.recipes import flags_to_argv, merge, recipe, recipes
from megatron_hybrid.costs import model_parameters, sizes_of
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.pattern import parse
from megatron_hybrid.placement import from_blocks

NAMES = [r.name for r in recipes()]


def pattern_of(args):
    """The pattern that parsed arguments ask for."""
    if args.hybrid_layer_pattern:
        return parse(args.hybrid_layer_pattern)
    return from_blocks(args.num_blocks, args.block_ratio, args.block_placement, args.block_mixers, args.ffn)


def test_every_recipe_is_accepted_by_megatrons_parser(parser):
    for r in recipes():
        argv = flags_to_argv(r.flags)
        args, unknown = parser.parse_known_args(argv)
        assert not unknown, (r.name, unknown)
        # What the parser holds is what the recipe says: no flag is shadowed by another one.
        actions = {name: a for a in parser._actions for name in a.option_strings}
        for flag, value in r.flags.items():
            action = actions[flag]
            expected = action.const if value is True else value
            if action.nargs == "+" and not isinstance(value, list):
                expected = [value]  # a flag that takes one or more values holds a list
            assert getattr(args, action.dest) == expected, (r.name, flag)
        args.vocab_size = args.vocab_size or 4096
        assert model_parameters(pattern_of(args), sizes_of(args)).non_embedding > 0


def test_every_flag_of_the_conflict_rules_exists(parser):
    from megatron_hybrid.cli import recipes as module

    known = {name for action in parser._actions for name in action.option_strings}
    named = {flag for pair in module._CONFLICTS for group in pair for flag in group}
    assert named | set(module._ROPE_FLAGS) <= known


def test_the_names_promised():
    sizes = ("100m", "350m", "1b", "3b")
    architectures = ("llama", "swa", "mamba", "inter", "intra")
    promised = {f"paper-{s}-{a}" for s in sizes for a in architectures}
    promised |= {f"paper-1b-{a}-moe" for a in ("llama", "mamba", "inter", "intra")}
    promised |= {"demo", "paper-1b-swa-1-1", "paper-1b-inter-1-3", "paper-1b-intra-1-0"}
    promised |= {"paper-350m-intra-1-10", "paper-1b-swa-0-1", "paper-1b-inter-1-5-front", "paper-1b-intra-32k"}
    promised |= {f"paper-scaling-{s}-{a}" for s in sizes for a in architectures if a != "swa"}
    assert promised <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) == len(recipes())
    assert all(r.name == recipe(r.name).name and r.summary for r in recipes())


def test_the_demo_is_small_and_holds_the_main_layers():
    flags = recipe("demo").flags
    counts = parse(flags["--hybrid-layer-pattern"]).counts()
    assert all(counts[symbol] for symbol in "M*P-E")
    args = argparse.Namespace(**{k[2:].replace("-", "_"): v for k, v in flags.items()}, vocab_size=4096)
    args.add_bias_linear = False
    parameters = model_parameters(parse(flags["--hybrid-layer-pattern"]), sizes_of(args))
    assert 0.5e6 < parameters.non_embedding < 1e6


def test_names_are_forgiving_and_unknown_ones_are_answered():
    assert recipe("paper-1b-intra-1-5") is recipe("PAPER-1B-INTRA")
    assert recipe("paper-350m-swa-3-11") is recipe("paper-350m-swa")
    assert recipe("paper-scaling-1b-inter-4e20") is recipe("paper-scaling-1b-inter")
    with pytest.raises(ValueError, match=r"no recipe 'paper-1b-itra'.*paper-1b-intra"):
        recipe("paper-1b-itra")
    with pytest.raises(ValueError, match="such as demo"):
        recipe("zzzz")


def test_the_listing_has_each_recipe_once_under_its_heading():
    lines = report.list_recipes().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == NAMES
    headings = [line for line in lines if line and not line.startswith("  ")]
    assert len(headings) == len(set(headings)) == len({r.group for r in recipes()})


def test_the_design_of_p_is_told_with_its_widths():
    args = argparse.Namespace(
        hidden_size=64, num_attention_heads=8, intra_preset="hymba", intra_window=7, intra_sinks=2
    )
    args.mamba_head_dim, args.mamba_num_groups = 16, 1
    rows = LAYERS["P"].account.describe(args)
    assert rows["P design"].startswith("hymba: branches attention,mamba, norm group, scale vector, fusion add")
    assert "4 heads, queries 32 (8 a head)" in rows["P attention"] and "window 7 with 2 sinks" in rows["P attention"]
    assert "inner width 64, 4 heads of 16" in rows["P Mamba"]
    args.intra_scale = "scalar"
    assert LAYERS["P"].account.describe(args)["P design"].startswith("no preset's: ")
    args = argparse.Namespace(hidden_size=64, num_attention_heads=8, intra_preset="diff-mamba", mamba_num_groups=1)
    assert list(LAYERS["P"].account.describe(args)) == ["P design", "P Mamba"]


# Command lines -----------------------------------------------------------------------------------


def test_flags_become_words():
    flags = {"--swiglu": True, "--lr": 1e-3, "--range": [0.01, 2.0], "--pattern": "-M-"}
    words = ["--swiglu", "--lr", "0.001", "--range", "0.01", "2.0", "--pattern=-M-"]
    assert flags_to_argv(flags) == words
    with pytest.raises(ValueError, match="--bf16 is False"):
        flags_to_argv({"--bf16": False})


BASE = {
    "--num-blocks": 13,
    "--block-ratio": "1:5",
    "--ffn": "moe",
    "--num-experts": 8,
    "--moe-router-topk": 1,
    "--position-embedding-type": "rope",
    "--rotary-base": 500000,
    "--use-rope-scaling": True,
    "--train-iters": 100,
    "--lr-wsd-decay-iters": 20,
    "--lr-warmup-fraction": 0.25,
    "--swiglu": True,
    "--bf16": True,
    "--lr": 0.1,
}


def merged(user):
    """The merged line as flag -> words, the user's repetitions of a flag kept apart."""
    line = merge(BASE, user)
    starts = [i for i, word in enumerate(line) if word.startswith("--")]
    return [tuple(line[a:b]) for a, b in zip(starts, [*starts[1:], len(line)], strict=True)]


@pytest.mark.parametrize(
    ("user", "gone", "there"),
    [
        ([], [], []),
        (["--lr", "0.2"], [("--lr", "0.1")], [("--lr", "0.2")]),
        (["--lr=0.2"], [("--lr", "0.1")], [("--lr=0.2",)]),
        (
            ["--hybrid-layer-pattern", "M-"],
            [("--num-blocks", "13"), ("--block-ratio", "1:5"), ("--ffn", "moe")],
            [("--num-experts", "8")],
        ),
        (
            ["--train-samples", "500"],
            [("--train-iters", "100"), ("--lr-wsd-decay-iters", "20")],
            [("--lr-wsd-decay-samples", "100"), ("--lr-warmup-fraction", "0.25")],
        ),
        (
            ["--train-iters", "50"],
            [("--train-iters", "100"), ("--lr-wsd-decay-iters", "20")],
            [("--train-iters", "50"), ("--lr-wsd-decay-iters", "10")],
        ),
        (
            ["--train-iters", "50", "--lr-wsd-decay-iters", "3"],
            [("--lr-wsd-decay-iters", "10"), ("--lr-wsd-decay-iters", "20")],
            [("--lr-wsd-decay-iters", "3")],
        ),
        (
            ["--lr-warmup-iters", "5"],
            [("--lr-warmup-fraction", "0.25")],
            [("--train-iters", "100"), ("--lr-wsd-decay-iters", "20")],
        ),
        (
            ["--position-embedding-type", "none"],
            [("--rotary-base", "500000"), ("--use-rope-scaling",)],
            [("--position-embedding-type", "none")],
        ),
        (["--position-embedding-type=rope"], [], [("--rotary-base", "500000")]),
        (
            ["--ffn", "dense"],
            [("--num-experts", "8"), ("--moe-router-topk", "1")],
            [("--num-blocks", "13")],
        ),
        (["--no-bf16"], [("--bf16",), ("--no-bf16",)], []),
        (["--fp16"], [("--bf16",)], [("--fp16",)]),
        (["--squared-relu"], [("--swiglu",)], []),
        (["--no-rope-fusion"], [], [("--no-rope-fusion",), ("--use-rope-scaling",)]),
    ],
)
def test_the_users_flags_win(user, gone, there):
    line = merged(user)
    assert not set(gone) & set(line)
    assert set(there) <= set(line)
    changed = {words[0] for words in [*gone, *there]}
    for words in merged([]):
        if words[0] not in changed and words[0] not in {w.partition("=")[0] for w in user}:
            assert words in line, "a flag that the user did not touch is gone"


def test_block_flags_take_a_recipes_pattern_away():
    line = merge(recipe("demo").flags, ["--num-blocks", "4"])
    assert "--hybrid-layer-pattern" not in line
    assert line[-2:] == ["--num-blocks", "4"]


@given(st.lists(st.sampled_from(sorted(BASE)), unique=True), st.sampled_from(NAMES))
def test_a_users_flag_stands_once_and_in_the_users_words(flags, name):
    user = [word for flag in flags for word in (flag, "7")]
    line = merge(recipe(name).flags, user)
    assert line[len(line) - len(user) :] == user
    assert all(line.count(flag) == 1 for flag in flags)


def test_merged_lines_still_parse(parser):
    line = merge(recipe("paper-1b-intra-moe").flags, ["--train-samples", "1000", "--no-bf16"])
    args = parser.parse_args(line)
    assert (args.train_iters, args.train_samples, args.lr_wsd_decay_samples) == (None, 1000, 200)
    assert args.bf16 is False
