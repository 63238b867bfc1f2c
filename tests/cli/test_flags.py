"""From a command line to plain flags: resolution, precedence, and what is refused before torch is imported."""

import pytest

from megatron_hybrid.cli import flags
from megatron_hybrid.cli.config import HybridConfig


def resolve(line):
    return flags.resolve(line.split())


def test_a_pattern_is_expanded_and_explicit():
    command = resolve("--hidden-size 8 --hybrid-layer-pattern (M-)2P- --lr 1")
    assert command.argv == ["--hidden-size", "8", "--lr", "1", "--hybrid-layer-pattern=M-M-P-"]
    assert (str(command.pattern), command.recipe, command.device, command.print_config) == (
        "M-M-P-",
        None,
        "auto",
        False,
    )


def test_both_spellings_of_a_flag_are_replaced():
    for spelling in ("--hybrid-layer-pattern=-M", "--hybrid-layer-pattern=M-"):
        argv = resolve(f"{spelling} --lr 1").argv
        assert argv == ["--lr", "1", spelling]


def test_block_flags_make_the_pattern():
    command = resolve("--num-blocks 3 --block-ratio 1:2 --block-placement end --block-mixers *:M --ffn moe")
    assert str(command.pattern) == "MEME*E"
    assert command.argv[-1] == "--hybrid-layer-pattern=MEME*E"


def test_a_recipe_gives_the_pattern_and_the_user_wins():
    demo = resolve("--recipe demo")
    assert demo.recipe == "demo"
    assert demo.argv[:2] == ["--recipe", "demo"]
    assert {"*", "M", "P", "-", "E"} == set(str(demo.pattern))
    ours = resolve("--recipe demo --lr 7 --hybrid-layer-pattern M-")
    assert str(ours.pattern) == "M-"
    assert ours.argv.count("--lr") == 1
    assert ours.argv[ours.argv.index("--lr") + 1] == "7"


def test_print_config_and_device_are_read():
    command = resolve("--hybrid-layer-pattern M- --print-config --device=cpu")
    assert command.print_config and command.device == "cpu"
    assert "--print-config" not in command.argv  # Megatron's parser does not know it
    assert "--device=cpu" in command.argv


def test_defaults_are_those_of_the_configuration():
    known = flags._known([])
    fields = HybridConfig()
    for name in (
        "device",
        "num_blocks",
        "block_ratio",
        "block_placement",
        "block_mixers",
        "ffn",
        "recipe",
        "balance_pipeline",
    ):
        assert getattr(known, name) == getattr(fields, name), name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["no layers", "--recipe", "--hybrid-layer-pattern", "--num-blocks"]),
        ("--hybrid-layer-pattern M-Q-", ["'Q'", "position 3", "M-Q-\n      ^"]),
        ("--hybrid-layer-pattern M-M-M- --pipeline-model-parallel-size 4", ["6 layers", "4 pipeline stages"]),
        ("--hybrid-layer-pattern M-|M-|M- --pipeline-model-parallel-size 2", ["3 pipeline segments", "2"]),
        ("--hybrid-layer-pattern M- --pipeline-model-parallel-size 0", ["0", "at least 1"]),
        ("--recipe paper-1b-itra", ["'paper-1b-itra'", "paper-1b-intra", "--list-recipes"]),
        ("--hybrid-layer-pattern M- --num-blocks 2", ["--hybrid-layer-pattern", "--num-blocks", "drop one"]),
        ("--num-blocks 2", ["--block-ratio 1:5"]),
        ("--num-blocks two --block-ratio 1:1", ["--num-blocks", "'two'"]),
        ("--hybrid-layer-pattern M- --device tpu", ["--device", "'tpu'", "cuda"]),
        ("--hybrid-layer-pattern", ["--hybrid-layer-pattern", "expected one argument"]),
        ("--num-blocks 4 --block-ratio 1:1 --block-placement left", ["left", "scatter"]),
        ("--num-blocks 4 --block-ratio 1:1 --block-mixers Q:M", ["Q"]),
    ],
)
def test_a_mistake_is_a_value_error_with_the_remedy(line, words):
    with pytest.raises(ValueError) as error:
        resolve(line)
    for word in words:
        assert word in str(error.value)


def test_balanced_stages_take_the_place_of_boundaries_and_set_the_stages():
    from megatron_hybrid.pattern import parse

    command = resolve("--hybrid-layer-pattern M-M-P- --balance-pipeline 3 --lr 1")
    assert command.balance == 3
    found = command.with_pattern(parse("M-M|-P|-"), 3)
    assert found.balance is None
    assert str(found.pattern) == "M-M|-P|-"
    assert found.argv == [
        *("--lr", "1", "--pipeline-model-parallel-size", "3"),
        "--hybrid-layer-pattern=M-M|-P|-",
    ]
    # a pattern that the stages do not divide is the balance's to cut
    uneven = resolve("--hybrid-layer-pattern M-M-P --balance-pipeline 2 --pipeline-model-parallel-size 2")
    assert uneven.balance == 2
    with pytest.raises(ValueError, match="do not divide over 2 pipeline stages"):
        uneven.with_pattern(parse("M-|M-|P"), 2)
