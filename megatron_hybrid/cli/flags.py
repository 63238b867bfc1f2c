"""From what a user typed to what Megatron parses: recipes and patterns become plain flags.

Pure text: this module imports neither torch nor Megatron, so that ``--list-recipes`` and a wrong pattern
answer at once.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hybrid import pattern, placement
from megatron_hybrid.argv import value, without
from megatron_hybrid.cli import recipes
from megatron_hybrid.cli.config import HybridConfig
from megatron_hybrid.data import blend
from megatron_hybrid.layers import registry
from megatron_hybrid.pattern import Pattern

DATA_FLAGS = (
    "--data-path",
    "--data-args-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--per-split-data-args-path",
    "--mock-data",
)
"""Upstream's ways to name the data, one of which --data-blend stands for."""


@dataclass(frozen=True)
class Command:
    """A resolved command line."""

    argv: list[str]
    """Flags for Megatron's parser and ours: the recipe's first, then the user's, the pattern explicit."""

    pattern: Pattern
    recipe: str | None
    """The one that is run: the preset's where the recipe has a row for each (see :func:`recipes.recipe`)."""

    device: str
    """As the user said: auto, cpu or cuda."""
    print_config: bool
    balance: int | None = None
    """Pipeline segments that are still to be balanced by cost (:func:`megatron_hybrid.cli.arguments.balance`), which
    needs the sizes of the model."""
    micro_batch_is_free: bool = False
    """The micro-batch is a recipe's and not the user's: on a GPU it is chosen by memory
    (:mod:`megatron_hybrid.cli.micro_batch_size`)."""
    notes: tuple[str, ...] = ()
    """For the user, on what was chosen."""

    def with_pattern(self, balanced: Pattern, pp: int) -> "Command":
        """The same command with the layers cut over ``pp`` pipeline stages.

        Raises:
            ValueError: The segments do not fit the stages.
        """
        pattern.check_pipeline(balanced, pp, _known(self.argv).num_virtual_stages_per_pipeline_rank)
        argv = self.argv
        for flag in ("--hybrid-layer-pattern", "--balance-pipeline", "--pipeline-model-parallel-size"):
            argv = without(argv, flag)
        argv = [*argv, "--pipeline-model-parallel-size", str(pp), f"--hybrid-layer-pattern={balanced}"]
        return replace(self, argv=argv, pattern=balanced, balance=None)


def resolve(argv: list[str]) -> Command:
    """Resolves the recipe, the layer pattern and the blend of a command line.

    Args:
        argv: Arguments after the program's name.

    Raises:
        ValueError: Unknown recipe, bad pattern, no pattern at all, a pattern that the pipeline cannot split, a file
            that is not a blend, or a flag with an invalid value; the text says what to change.
    """
    argv = [_renamed(arg) for arg in argv]
    first = load_layers(argv)
    rest = _without_ours(argv)
    recipe = recipes.recipe(first.recipe, first.intra_preset) if first.recipe else None
    free = recipe is not None and not value(rest, "--micro-batch-size")
    if recipe:
        rest = recipes.merge(recipe.flags, rest)
    known = _known(rest)
    resolved = _pattern(known)
    vpp = known.num_virtual_stages_per_pipeline_rank
    if known.balance_pipeline is None:
        pattern.check_pipeline(resolved, known.pipeline_model_parallel_size, vpp)
    text = str(resolved)
    rest = without(rest, "--hybrid-layer-pattern")
    if recipe:
        rest = ["--recipe", recipe.name, *rest]
    if known.data_blend is not None:
        rest += ["--data-path", *_blend(known, rest)]
    return Command(
        argv=[*rest, f"--hybrid-layer-pattern={text}"],
        pattern=resolved,
        recipe=recipe.name if recipe else None,
        device=known.device,
        print_config=first.print_config,
        balance=known.balance_pipeline,
        micro_batch_is_free=free,
    )


def load_layers(argv: list[str]) -> argparse.Namespace:
    """Registers the layers of installed packages and of --layers-from; returns the flags that are known so far.

    Raises:
        ValueError: One cannot be loaded.
    """
    known = _known(argv)
    registry.load_entry_points()
    registry.load(known.layers_from)
    return known


def _blend(known: argparse.Namespace, argv: list[str]) -> list[str]:
    other = next((flag for flag in DATA_FLAGS for arg in argv if arg.split("=", 1)[0] == flag), None)
    if other:
        raise ValueError(f"Both --data-blend and {other} are given, and each names the data: drop one.")
    return blend.data_path(Path(known.data_blend), known.split)


def _known(argv: list[str]) -> argparse.Namespace:
    try:
        return _parser().parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. See --help.") from error


def _parser() -> argparse.ArgumentParser:
    """The few flags that are needed before Megatron's parser exists."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    defaults = HybridConfig()
    parser.add_argument("--recipe")
    parser.add_argument("--intra-preset")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default=defaults.device)
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--layers-from", nargs="*", default=defaults.layers_from)
    parser.add_argument("--data-blend", default=defaults.data_blend)
    parser.add_argument("--split", default=blend.DEFAULT_SPLIT)
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--block-ratio")
    parser.add_argument("--block-placement", default=defaults.block_placement)
    parser.add_argument("--block-mixers", default=defaults.block_mixers)
    parser.add_argument("--ffn", default=defaults.ffn)
    parser.add_argument("--balance-pipeline", type=int, default=defaults.balance_pipeline)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    return parser


def _pattern(known: argparse.Namespace) -> Pattern:
    if known.hybrid_layer_pattern and known.num_blocks:
        raise ValueError("Both --hybrid-layer-pattern and --num-blocks are given, and each sets the layers: drop one.")
    if known.hybrid_layer_pattern:
        return pattern.parse(known.hybrid_layer_pattern)
    if known.num_blocks:
        if known.block_ratio is None:
            raise ValueError("--num-blocks needs --block-ratio, such as --block-ratio 1:5.")
        return placement.from_blocks(
            known.num_blocks, known.block_ratio, known.block_placement, known.block_mixers, known.ffn
        )
    raise ValueError(
        "The run has no layers: give --recipe NAME (see --list-recipes), --hybrid-layer-pattern such as "
        "'M-M-P-', or --num-blocks with --block-ratio."
    )


def _renamed(arg: str) -> str:
    """The pattern under its old name, which Megatron takes as long as it is the only one."""
    name, equals, text = arg.partition("=")
    return f"--hybrid-layer-pattern{equals}{text}" if name == "--hybrid-override-pattern" else arg


def _without_ours(argv: list[str]) -> list[str]:
    return [arg for arg in without(argv, "--recipe") if arg != "--print-config"]


def with_mock_data(argv: list[str]) -> list[str]:
    """``argv`` with random tokens instead of the data that it names, for programs that read none."""
    kept, skip = [], False
    for arg in argv:
        if arg.startswith("--"):
            skip = arg.split("=", 1)[0] in (*DATA_FLAGS, "--data-blend")
        if not skip:
            kept.append(arg)
    return [*kept, "--mock-data"]
