"""Named runs: the study's sizes and architectures, its mixtures of experts, and a CPU demo.

A recipe is nothing but default values for command-line flags (Megatron's and ours); any flag
that the user gives wins, see :func:`merge`. Sizes: arXiv:2510.04800v3, Tables 4, 8 and 9.

The study's training: 60 billion tokens in batches of 2 million, 8192 tokens of context, a
trapezoidal schedule (25% warm-up, 20% linear decay). Ours, where the study's figures are silent:

- the learning rates, one per scale, on the conservative side of common practice;
- 22 blocks for the 3B inter-layer hybrid, the number nearest the Transformer's parameters;
- query/key widths of the intra-layer hybrid at 100M, 350M and 3B (72, 48 and 96 per head);
- AdamW's betas (0.9, 0.95), weight decay (0.1) and gradient clipping (1.0);
- how often a run logs, validates and saves (every 10, 1000 and 1000 iterations; 2 million tokens each);
- widths of the designs in Table 18 other than the study's own, see :mod:`megatron_hybrid.intra_recipes`.

Tensor parallelism: at 1B, the study's 18 SSM heads of 128 in ``P`` layers allow 1 and 2 ranks.
``--intra-ssm-head-dim 144`` makes 16 heads of the same width, for up to 16 ranks; that head size is ours.

This module imports neither torch nor Megatron.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hybrid import intra_recipes
from megatron_hybrid.intra_design import AXES, PRESETS

Value = str | int | float | bool | list[str] | list[float]
Flags = dict[str, Value]

PAPER = "arXiv:2510.04800v3"


@dataclass(frozen=True)
class Recipe:
    """A named run."""

    name: str
    summary: str
    flags: Flags
    """Flag name with its dashes to value; True is a flag without a value."""
    source: str
    """Where its sizes come from."""
    group: str
    """Heading that it is listed under."""


@dataclass(frozen=True)
class _Scale:
    """One scale of Table 8. Names of the fields are those of the flags that they set."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    llama_blocks: int
    mamba_blocks: int
    inter_blocks: int
    intra_blocks: int
    mamba_head_dim: int
    mamba_state_dim: int
    intra_num_attention_heads: int
    intra_num_query_groups: int
    intra_qk_dim: int
    intra_ssm_dim: int
    lr: float


# The intra-layer hybrid's value width is the hidden size at every scale (full-width V). The query
# and key width is stated for 1B alone: 1152 = 16 x 72. Half the hidden size elsewhere, but for
# 100M, where 72 per head is what makes the count print as the published 0.10 billion.
_SCALES = {
    "100m": _Scale(1024, 3072, 16, 4, 8, 6, 6, 6, 128, 128, 8, 2, 576, 1024, 1.5e-3),
    "350m": _Scale(1536, 4096, 24, 8, 14, 11, 11, 11, 128, 128, 16, 4, 768, 1536, 1e-3),
    "1b": _Scale(2048, 8192, 32, 8, 16, 13, 13, 13, 128, 128, 16, 4, 1152, 2304, 6e-4),
    "3b": _Scale(3072, 8192, 32, 8, 28, 21, 22, 22, 192, 256, 16, 4, 1536, 3072, 4e-4),
}

# Architecture: its mixers, where its attention-bearing blocks stand, and a few words.
_ARCHITECTURES = {
    "llama": ("*:M", "middle", "Transformer"),
    "swa": ("*:W", "middle", "sliding-window Transformer with sinks"),
    "mamba": ("*:M", "middle", "Mamba-2"),
    "inter": ("*:M", "middle", "inter-layer hybrid"),
    "intra": ("P:M", "scatter", "intra-layer hybrid"),
}

# Ratios of Table 9 beside 1:5, attention-bearing blocks first.
_RATIOS = {
    "swa": ("1:1", "1:3"),
    "inter": ("1:1", "1:3", "1:12"),
    "intra": ("1:0", "1:1", "1:3", "1:12"),
}

_BATCH, _CONTEXT, _TOKENS = 256, 8192, 60_000_000_000
_ITERATIONS = round(_TOKENS / (_BATCH * _CONTEXT))
_DECAY = 0.2

_ENGINE: Flags = {
    "--use-distributed-optimizer": True,
    "--ckpt-format": "torch_dist",
    "--dist-ckpt-optim-fully-reshardable": True,
}

_MODEL: Flags = {
    "--normalization": "RMSNorm",
    "--swiglu": True,
    "--disable-bias-linear": True,
    "--group-query-attention": True,
    "--attention-dropout": 0.0,
    "--hidden-dropout": 0.0,
    "--position-embedding-type": "rope",
    "--mamba-num-groups": 1,
    "--mamba-a-init-range": [0.01, 2.0],
}

_TRAINING: Flags = {
    "--optimizer": "adam",
    "--adam-beta1": 0.9,
    "--adam-beta2": 0.95,
    "--weight-decay": 0.1,
    "--clip-grad": 1.0,
    "--lr-decay-style": "WSD",
    "--lr-wsd-decay-style": "linear",
    "--lr-warmup-fraction": 0.25,
}

_INTERVALS: Flags = {
    "--log-interval": 10,
    "--log-throughput": True,
    "--eval-interval": 1000,
    "--eval-iters": 20,
    "--save-interval": 1000,
}

_MOE: Flags = {
    "--num-experts": 8,
    "--moe-router-topk": 1,
    "--moe-router-score-function": "sigmoid",
    "--moe-router-enable-expert-bias": True,
    "--moe-router-bias-update-rate": 1e-3,
    "--moe-router-load-balancing-type": "none",
    "--moe-router-dtype": "fp32",
    "--moe-token-dispatcher-type": "alltoall",
    "--moe-grouped-gemm": True,
}


def _moe(ffn: int) -> Flags:
    """One routed and one shared expert, each half as wide as the dense FFN: equal active width."""
    return {
        **_MOE,
        "--moe-ffn-hidden-size": ffn // 2,
        "--moe-shared-expert-intermediate-size": ffn // 2,
    }


def _blocks(scale: _Scale, architecture: str, ratio: str) -> int:
    if architecture in ("llama", "swa"):
        return scale.llama_blocks
    if architecture == "inter" and ratio == "1:1" and scale.inter_blocks % 2:
        return scale.inter_blocks + 1  # Table 9 has 7:7 beside the other ratios' 13 blocks.
    return getattr(scale, f"{architecture}_blocks")


def _paper(size: str, architecture: str, ratio: str, name: str, group: str, moe: bool = False) -> Recipe:
    scale = _SCALES[size]
    mixers, placement, words = _ARCHITECTURES[architecture]
    blocks = _blocks(scale, architecture, ratio)
    flags: Flags = {
        "--num-blocks": blocks,
        "--block-ratio": ratio,
        "--block-placement": placement,
        "--block-mixers": mixers,
        "--ffn": "moe" if moe else "dense",
        **_MODEL,
        "--rotary-base": 500000,
        "--use-rope-scaling": True,
        "--rope-scaling-factor": 32.0,
        "--swa-window": 512,
        "--swa-sinks": 64,
        "--swa-rotary-base": 10000,
        "--hidden-size": scale.hidden_size,
        "--ffn-hidden-size": scale.ffn_hidden_size,
        "--num-attention-heads": scale.num_attention_heads,
        "--num-query-groups": scale.num_query_groups,
        "--mamba-num-heads": 2 * scale.hidden_size // scale.mamba_head_dim,
        "--mamba-head-dim": scale.mamba_head_dim,
        "--mamba-state-dim": scale.mamba_state_dim,
        "--intra-num-attention-heads": scale.intra_num_attention_heads,
        "--intra-num-query-groups": scale.intra_num_query_groups,
        "--intra-qk-dim": scale.intra_qk_dim,
        "--intra-value-dim": scale.hidden_size,
        "--intra-ssm-dim": scale.intra_ssm_dim,
        **(_moe(scale.ffn_hidden_size) if moe else {}),
        "--vocab-size": 128256,
        "--seq-length": _CONTEXT,
        "--max-position-embeddings": _CONTEXT,
        "--micro-batch-size": 1,
        "--global-batch-size": _BATCH,
        "--train-iters": _ITERATIONS,
        **_TRAINING,
        "--lr-wsd-decay-iters": round(_DECAY * _ITERATIONS),
        "--lr": scale.lr,
        "--bf16": True,
        **_INTERVALS,
        **_ENGINE,
    }
    shape = f" {ratio}" if architecture in _RATIOS else ""
    experts = ", 8 experts and a shared one" if moe else ""
    summary = f"{size.upper()} {words}{shape}, {blocks} blocks{experts}"
    tables = "Table 8" + (", Table 4" if moe else ", Table 9" if size == "1b" else "")
    return Recipe(name, summary, flags, f"{PAPER}, {tables}", group)


def _demo() -> Recipe:
    """About a million non-embedding parameters with the main kinds of layer, on two processes."""
    flags: Flags = {
        "--hybrid-layer-pattern": "M-M-P-ME*-ME",
        **_MODEL,
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
        **_MOE,
        "--num-experts": 4,
        "--moe-ffn-hidden-size": 64,
        "--moe-shared-expert-intermediate-size": 64,
        "--expert-model-parallel-size": 2,
        "--seq-length": 256,
        "--max-position-embeddings": 256,
        "--micro-batch-size": 4,
        "--global-batch-size": 8,
        "--train-iters": 300,
        **_TRAINING,
        "--lr-warmup-fraction": 0.1,
        "--lr-wsd-decay-iters": 60,
        "--lr": 3e-3,
        "--log-interval": 10,
        "--eval-interval": 100,
        "--eval-iters": 4,
        "--save-interval": 100,
        **_ENGINE,
    }
    summary = "CPU demo: M, *, P, - and E layers in under a million parameters, 2 processes"
    return Recipe("demo", summary, flags, "ours", "Demo")


def _row(base: Recipe, row: intra_recipes.Row, group: str) -> Recipe:
    """A row of the study's design space: a recipe with some flags changed."""
    summary = f"1B P:M {base.flags['--block-ratio']}, {row.words}"
    return Recipe(f"paper-1b-intra-{row.name}", summary, {**base.flags, **row.flags}, f"{PAPER}, {row.source}", group)


def _all() -> dict[str, Recipe]:
    found = [_demo()]
    for size in _SCALES:
        for architecture in _ARCHITECTURES:
            ratio = {"llama": "1:0", "mamba": "0:1"}.get(architecture, "1:5")
            name = f"paper-{size}-{architecture}"
            found.append(_paper(size, architecture, ratio, name, f"{size.upper()} (Table 8)"))
    for architecture, ratios in _RATIOS.items():
        for ratio in ratios:
            name = f"paper-1b-{architecture}-{ratio.replace(':', '-')}"
            found.append(_paper("1b", architecture, ratio, name, "1B, other ratios (Table 9)"))
    for architecture, ratio in (
        ("llama", "1:0"),
        ("mamba", "0:1"),
        ("inter", "1:5"),
        ("intra", "1:5"),
    ):
        name = f"paper-1b-{architecture}-moe"
        found.append(_paper("1b", architecture, ratio, name, "1B, mixtures of experts (Table 4)", moe=True))
    known = {r.name: r for r in found}
    all_p = known["paper-1b-intra-1-0"]
    names = "norm-scale-fusion-value-output, or a preset"
    found += [_row(all_p, row, f"1B, designs of P (Table 18): {names}") for row in intra_recipes.table_18()]
    found += [_row(all_p, row, "1B, widths of P (Table 20)") for row in intra_recipes.table_20()]
    for ratio, row in intra_recipes.table_21():
        base = known["paper-1b-intra" if ratio == "1:5" else f"paper-1b-intra-{ratio.replace(':', '-')}"]
        found.append(_row(base, row, "1B, placements of P (Table 21)"))
    return {r.name: r for r in found}


_RECIPES = _all()


def recipes() -> list[Recipe]:
    """All recipes, the demo first."""
    return list(_RECIPES.values())


def recipe(name: str, preset: str | None = None) -> Recipe:
    """The recipe of that name (``paper-1b-intra-1-5`` is ``paper-1b-intra``, and so on).

    With ``--intra-preset``, ``paper-1b-intra`` and ``paper-1b-intra-1-0`` stand for that design's row of Table 18, with
    its blocks and widths: a sweep over presets then compares what the study compares. Other recipes keep theirs, and
    the preset changes the axes alone.

    Raises:
        ValueError: for an unknown name, with the names that are close to it.
    """
    known = name.lower()
    if known.endswith("-1-5") and known[:-4].endswith(tuple(_RATIOS)):
        known = known[:-4]
    if name.lower() in ("paper-1b-intra", "paper-1b-intra-1-0") and preset in PRESETS:
        known = f"paper-1b-intra-{'paper-final' if preset == 'paper' else preset}"
    if known in _RECIPES:
        return _RECIPES[known]
    close = difflib.get_close_matches(known, _RECIPES, n=4, cutoff=0.5)
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
    length keeps the recipe's share of decay.
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
    kept |= _decay(recipe_flags, user)
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
