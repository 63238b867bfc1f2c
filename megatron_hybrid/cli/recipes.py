"""Named runs: the paper's, and a CPU demo.

A recipe is a set of default values for command-line flags (Megatron's and ours); flags that the
user gives override it, see :func:`merge`. The paper's are in :mod:`megatron_hybrid.cli.paper_recipes`.

This module imports neither torch nor Megatron.
"""

import difflib
from collections.abc import Mapping

from megatron_hybrid.cli import paper_recipes
from megatron_hybrid.cli.paper_recipes import ENGINE, MODEL, MOE, TRAINING, Flags, Recipe, Value
from megatron_hybrid.layers.intra.design import AXES


def _demo() -> Recipe:
    """About a million non-embedding parameters with the main kinds of layer, on two processes."""
    flags: Flags = {
        "--hybrid-layer-pattern": "M-M-P-ME*-ME",
        **MODEL,
        "--rotary-base": 10000,
        "--hidden-size": 128,
        "--ffn-hidden-size": 128,
        "--num-attention-heads": 4,
        "--num-query-groups": 2,
        "--mamba-num-heads": 6,
        "--mamba-head-dim": 32,
        "--mamba-state-dim": 32,
        "--intra-num-attention-heads": 4,
        "--intra-num-query-groups": 2,
        **MOE,
        "--num-experts": 4,
        "--moe-ffn-hidden-size": 64,
        "--moe-shared-expert-intermediate-size": 64,
        "--expert-model-parallel-size": 2,
        "--seq-length": 256,
        "--max-position-embeddings": 256,
        "--micro-batch-size": 4,
        "--global-batch-size": 8,
        "--train-iters": 300,
        **TRAINING,
        "--lr-warmup-fraction": 0.1,
        "--lr-wsd-decay-iters": 60,
        "--lr": 3e-3,
        "--log-interval": 10,
        "--eval-interval": 100,
        "--eval-iters": 4,
        "--save-interval": 100,
        **ENGINE,
    }
    summary = "CPU demo: M, *, P, - and E layers in under a million parameters, 2 processes"
    return Recipe("demo", summary, flags, "ours", "Demo")


_RECIPES = {r.name: r for r in [_demo(), *paper_recipes.listed()]}
_UNLISTED = {r.name: r for r in paper_recipes.smaller_budgets()}
_ALIASES = paper_recipes.aliases()


def recipes() -> list[Recipe]:
    """All recipes, the demo first; those of smaller budgets are named in the summary of their largest."""
    return list(_RECIPES.values())


def recipe(name: str, preset: str | None = None) -> Recipe:
    """The recipe of that name (``paper-1b-intra-1-5`` is ``paper-1b-intra``, and so on).

    With ``--intra-preset``, ``paper-1b-intra`` and ``paper-1b-intra-1-0`` stand for that design's row of Table 18, with
    its blocks and widths, and those of 350M for Table 19's: a sweep over presets then compares what the paper compares.
    Other recipes keep theirs, and the preset changes the axes alone.

    Raises:
        ValueError: for an unknown name, with the names that are close to it.
    """
    lower = name.lower()
    known = paper_recipes.design_of(lower, preset) or _ALIASES.get(lower, lower)
    found = _RECIPES.get(known) or _UNLISTED.get(known)
    if found:
        return found
    close = difflib.get_close_matches(known, [*_RECIPES, *_UNLISTED], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"such as {', '.join(_RECIPES)}"
    raise ValueError(f"there is no recipe {name!r}; {hint} (--list-recipes shows all)")


# Command lines -----------------------------------------------------------------------------------


def flags_to_argv(flags: Mapping[str, Value]) -> list[str]:
    """Flags as command-line words, such as ``["--swiglu", "--lr", "0.001"]``.

    A value that starts with a dash (the pattern ``-M``) is joined with ``=``, as argparse wants.

    Raises:
        ValueError: for False, which no flag can express.
    """
    argv: list[str] = []
    for flag, value in flags.items():
        if value is False:
            raise ValueError(f"{flag} is False; leave the flag out, or give its opposite")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *(str(v) for v in value)]
        elif str(value).startswith("-"):
            argv.append(f"{flag}={value}")
        else:
            argv += [flag, str(value)]
    return argv


_BLOCK_FLAGS = ("--num-blocks", "--block-ratio", "--block-placement", "--block-mixers", "--ffn")
_PATTERN_FLAGS = ("--hybrid-layer-pattern", "--hybrid-override-pattern")
_ITER_FLAGS = ("--train-iters", "--lr-decay-iters", "--lr-wsd-decay-iters", "--lr-warmup-iters")
_SAMPLE_FLAGS = (
    "--train-samples",
    "--lr-decay-samples",
    "--lr-wsd-decay-samples",
    "--lr-warmup-samples",
)
_ROPE_FLAGS = (
    "--rotary-base",
    "--rotary-percent",
    "--use-rope-scaling",
    "--rope-scaling-factor",
    "--swa-rotary-base",
)
_AXIS_FLAGS = tuple(f"--intra-{axis}" for axis in AXES)

# A user's flag on the left takes the recipe's flags on the right away.
_CONFLICTS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (_PATTERN_FLAGS, _BLOCK_FLAGS + _PATTERN_FLAGS),
    (_BLOCK_FLAGS, _PATTERN_FLAGS),
    (_ITER_FLAGS, _SAMPLE_FLAGS),
    (_SAMPLE_FLAGS, _ITER_FLAGS),
    (("--intra-preset",), _AXIS_FLAGS),
    *[(group, group) for group in (
        ("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction"),
        ("--bf16", "--fp16"),
        ("--swiglu", "--squared-relu", "--quick-geglu", "--openai-gelu"),
        ("--mock-data", "--data-path", "--train-data-path", "--data-args-path"),
    )],
]  # fmt: skip


def merge(recipe_flags: Mapping[str, Value], user_argv: list[str]) -> list[str]:
    """A command line: the recipe's flags, then the user's, with the user's winning.

    A user's flag takes the same flag of the recipe away, and those that conflict with it: a
    pattern takes the block flags, ``--train-samples`` takes the lengths in iterations,
    ``--intra-preset`` takes the axes of ``P``, ``--position-embedding-type none`` takes the RoPE
    flags, ``--ffn dense`` those of the experts. ``--no-NAME`` takes a valueless flag ``--NAME`` of
    the recipe away and is spent by that (``--no-bf16``). A user's training length without a decay
    length keeps the recipe's share of decay. A warm-up that the recipe gives in iterations stays as long as it is.
    """
    user = _read(user_argv)
    kept = {flag: value for flag, value in recipe_flags.items() if flag not in user}
    spent = set()
    for flag, words in user.items():
        positive = "--" + flag.removeprefix("--no-")
        if flag.startswith("--no-") and kept.get(positive) is True:
            del kept[positive]
            spent.add(flag)
        for flag_names, taken in _CONFLICTS:
            if flag in flag_names:
                kept = {f: v for f, v in kept.items() if f not in taken}
        if flag == "--position-embedding-type" and words != ["rope"]:
            kept = {f: v for f, v in kept.items() if f not in _ROPE_FLAGS}
        if flag == "--ffn" and words != ["moe"]:
            kept = {f: v for f, v in kept.items() if f != "--num-experts" and not f.startswith("--moe-")}
    kept |= _decay(recipe_flags, user) | _warmup(recipe_flags, user)
    rest = [word for word in user_argv if word not in spent]
    return flags_to_argv(kept) + rest


def _read(argv: list[str]) -> dict[str, list[str]]:
    """Flags of a command line and the words that follow each."""
    found: dict[str, list[str]] = {}
    flag = None
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        elif flag is not None:
            found[flag].append(word)
    return found


def _decay(recipe_flags: Mapping[str, Value], user: Mapping[str, list[str]]) -> Flags:
    """The recipe's share of decay, for the training length that the user gives."""
    length, decay = recipe_flags.get("--train-iters"), recipe_flags.get("--lr-wsd-decay-iters")
    if not (isinstance(length, int) and isinstance(decay, int)):
        return {}
    for unit in ("iters", "samples"):
        words = user.get(f"--train-{unit}", [])
        name = f"--lr-wsd-decay-{unit}"
        if len(words) == 1 and words[0].isascii() and words[0].isdigit() and name not in user:
            return {name: max(1, round(decay / length * int(words[0])))}
    return {}


def _warmup(recipe_flags: Mapping[str, Value], user: Mapping[str, list[str]]) -> Flags:
    """The recipe's warm-up in samples, for a user who gives the length in them."""
    iterations, batch = recipe_flags.get("--lr-warmup-iters"), recipe_flags.get("--global-batch-size")
    if not (isinstance(iterations, int) and isinstance(batch, int) and "--train-samples" in user):
        return {}
    own = user.keys() & {"--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction"}
    return {} if own else {"--lr-warmup-samples": iterations * batch}
