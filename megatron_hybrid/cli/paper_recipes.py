"""The paper's runs: its sizes and architectures, ratios, placements, long samples, scaling runs and designs of ``P``.

Source: arXiv:2510.04800v3. From its text: AdamW with clipping; learning rates of 6e-3, 3e-3, 6e-4 and 3e-4 at 100M,
350M, 1B and 3B; a trapezoidal schedule, about 25% warm-up and 20% cool-down; 60 billion tokens in batches of 2 million,
8,192 tokens of context; the Llama-3.2 tokenizer, 128,256 ids; RoPE of base 500,000 with Llama-3's scaling (factor 32);
windows of 512 with 64 sinks and base 10,000; -A from [0.01, 2]. Attention crosses documents, so recipes leave
``--reset-attention-mask`` out. Scaling runs (Tables 14 and 15) take half a million tokens a step and a warm-up of a
quarter of the smallest budget's steps; runs on 16K and 32K tokens (Table 12) as many tokens as the FLOPs of the 1B
Transformer at 8K pay for. docs/recipes.md describes how to prepare the data, and what the paper leaves open.

OURS, where the text is silent:

- AdamW's betas (0.9, 0.95) and epsilon (1e-8), weight decay (0.1), the bound of clipping (1.0), the cool-down's shape
  (linear, to 0);
- query and key widths of the intra-layer hybrid at 100M and 3B (72 and 96 per head; at 350M Table 10's caches leave 48
  alone), and of all designs but the paper's own, see :mod:`megatron_hybrid.cli.intra_recipes`;
- windows with sinks at 100M and 3B, of which no row is printed, and where the one full attention of 1:15 stands;
- the batch of 16K and 32K runs, 2 million tokens as in the others;
- how often a run logs, validates and saves (every 10, 1000 and 1000 iterations).

Tensor parallelism: at 1B, the paper's 18 SSM heads of 128 in ``P`` layers allow 1 and 2 ranks.
``--intra-ssm-head-dim 144`` makes 16 heads of the same width, for up to 16 ranks; that head size is ours.

This module imports neither torch nor Megatron.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import cache

from megatron_hybrid import costs
from megatron_hybrid.cli import intra_recipes
from megatron_hybrid.layers.intra.design import PRESETS
from megatron_hybrid.placement import from_blocks

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
# 100M, where 72 per head is what makes the count print as the published 0.10 billion. 22 blocks of
# the 3B inter-layer hybrid are those whose steps Table 15 prints (21 would make 22 and 44 thousand).
_SCALES = {
    "100m": _Scale(1024, 3072, 16, 4, 8, 6, 6, 6, 128, 128, 8, 2, 576, 1024, 6e-3),
    "350m": _Scale(1536, 4096, 24, 8, 14, 11, 11, 11, 128, 128, 16, 4, 768, 1536, 3e-3),
    "1b": _Scale(2048, 8192, 32, 8, 16, 13, 13, 13, 128, 128, 16, 4, 1152, 2304, 6e-4),
    "3b": _Scale(3072, 8192, 32, 8, 28, 21, 22, 22, 192, 256, 16, 4, 1536, 3072, 3e-4),
}

# Architecture: its mixers, where its attention-bearing blocks stand, and a few words.
_ARCHITECTURES = {
    "llama": ("*:M", "middle", "Transformer"),
    "swa": ("*:W", "middle", "sliding-window Transformer with sinks"),
    "mamba": ("*:M", "middle", "Mamba-2"),
    "inter": ("*:M", "middle", "inter-layer hybrid"),
    "intra": ("P:M", "scatter", "intra-layer hybrid"),
}

# Ratios of Tables 9 and 10 besides those of Table 8's models, attention-bearing blocks first.
_RATIOS = {
    "1b": {
        "swa": ("1:1", "1:3", "1:15", "0:1"),
        "inter": ("1:1", "1:3", "1:12"),
        "intra": ("1:0", "1:1", "1:3", "1:12"),
    },
    "350m": {"inter": ("1:1", "1:3", "1:10"), "intra": ("1:0", "1:1", "1:3", "1:10")},
}

# Tables 11 and 17 without the rows that Tables 9 and 10 have: the middle, but for Table 9's windows of 1:1, whose
# losses are those of the front.
_FIRST = {("swa", "1:1"): "front"}
_PLACEMENTS = {
    "1b": (
        ("swa", "1:1", "end"), ("swa", "1:3", "front"), ("swa", "1:3", "end"), ("swa", "1:5", "front"),
        ("swa", "1:5", "end"), ("inter", "1:1", "front"), ("inter", "1:3", "front"), ("inter", "1:3", "end"),
        ("inter", "1:5", "front"), ("inter", "1:5", "end"),
    ),
    "350m": (
        ("inter", "1:1", "front"), ("inter", "1:3", "front"), ("inter", "1:3", "end"), ("inter", "1:5", "front"),
        ("inter", "1:5", "end"),
    ),
}  # fmt: skip

_BUDGETS = ("2e19", "4e19", "8e19", "2e20", "4e20")
"""Training FLOPs of Tables 14 and 15."""
_LARGEST = {"llama": "8e19", "mamba": "4e19", "inter": "8e19", "intra": "8e19"}
"""At 100M; the other sizes have all of them."""

_BATCH_TOKENS, _CONTEXT, _TOKENS = 2**21, 8192, 60_000_000_000
_SCALING_BATCH_TOKENS = 2**19
_WARMUP, _DECAY = 0.25, 0.2

ENGINE: Flags = {
    "--use-distributed-optimizer": True,
    "--ckpt-format": "torch_dist",
    "--dist-ckpt-optim-fully-reshardable": True,
}

MODEL: Flags = {
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

TRAINING: Flags = {
    "--optimizer": "adam",
    "--adam-beta1": 0.9,
    "--adam-beta2": 0.95,
    "--weight-decay": 0.1,
    "--clip-grad": 1.0,
    "--lr-decay-style": "WSD",
    "--lr-wsd-decay-style": "linear",
    "--lr-warmup-fraction": _WARMUP,
}

_INTERVALS: Flags = {
    "--log-interval": 10,
    "--log-throughput": True,
    "--eval-interval": 1000,
    "--eval-iters": 20,
    "--save-interval": 1000,
}

MOE: Flags = {
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
        **MOE,
        "--moe-ffn-hidden-size": ffn // 2,
        "--moe-shared-expert-intermediate-size": ffn // 2,
    }


# A run ---------------------------------------------------------------------------------------------


def _usual(size: str, architecture: str) -> str:
    """The ratio of Table 8's models; Table 10 prints 3:11 for windows at 350M, where 1:5 would be 2:12."""
    if (size, architecture) == ("350m", "swa"):
        return "3:11"
    return {"llama": "1:0", "mamba": "0:1"}.get(architecture, "1:5")


def _blocks(scale: _Scale, architecture: str, ratio: str) -> int:
    if architecture in ("llama", "swa"):
        return scale.llama_blocks
    if architecture == "inter" and ratio == "1:1" and scale.inter_blocks % 2:
        return scale.inter_blocks + 1  # Tables 9 and 10 have 7:7 and 6:6, next to 13 and 11 blocks at the other ratios.
    return getattr(scale, f"{architecture}_blocks")


def _flags(size: str, architecture: str, ratio: str, moe: bool = False, placement: str = "") -> Flags:
    scale = _SCALES[size]
    mixers, usual_placement, _ = _ARCHITECTURES[architecture]
    return {
        "--num-blocks": _blocks(scale, architecture, ratio),
        "--block-ratio": ratio,
        "--block-placement": placement or _FIRST.get((architecture, ratio), usual_placement),
        "--block-mixers": mixers,
        "--ffn": "moe" if moe else "dense",
        **MODEL,
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
        **_intra_widths(size, architecture, ratio),
        **(_moe(scale.ffn_hidden_size) if moe else {}),
        "--vocab-size": 128256,
        **_length(_TOKENS),
        **TRAINING,
        "--lr": scale.lr,
        "--bf16": True,
        **_INTERVALS,
        **ENGINE,
    }


def _intra_widths(size: str, architecture: str, ratio: str) -> Flags:
    if (architecture, ratio) == ("intra", "1:0"):  # at 350M other widths than in hybrids with Mamba, see intra_recipes
        return {**intra_recipes.width_flags(intra_recipes.SCALES[size].own)}
    scale = _SCALES[size]
    return {**intra_recipes.width_flags((scale.intra_qk_dim, scale.hidden_size, scale.intra_ssm_dim))}


def _length(tokens: float, batch: int = _BATCH_TOKENS, context: int = _CONTEXT) -> Flags:
    iterations = round(tokens / batch)
    return {
        "--seq-length": context,
        "--max-position-embeddings": context,
        "--micro-batch-size": 1,
        "--global-batch-size": batch // context,
        "--train-iters": iterations,
        "--lr-wsd-decay-iters": round(_DECAY * iterations),
    }


def _tokens(flags: Flags, budget: float) -> float:
    """Tokens that a budget of training FLOPs allows, as the paper counts them."""
    args = Namespace(**{flag[2:].replace("-", "_"): value for flag, value in flags.items()}, add_bias_linear=False)
    layers = from_blocks(args.num_blocks, args.block_ratio, args.block_placement, args.block_mixers, args.ffn)
    return costs.match_flops(budget, layers, costs.sizes_of(args), "paper")


# Names and groups ----------------------------------------------------------------------------------


def _name(size: str, architecture: str, ratio: str) -> str:
    return f"paper-{size}-{architecture}" + ("" if ratio == _usual(size, architecture) else f"-{_dashed(ratio)}")


def _dashed(ratio: str) -> str:
    return ratio.replace(":", "-")


def _words(size: str, architecture: str, flags: Flags) -> str:
    shape = "" if architecture in ("llama", "mamba") else f" {flags['--block-ratio']}"
    return f"{size.upper()} {_ARCHITECTURES[architecture][2]}{shape}, {flags['--num-blocks']} blocks"


def _model(size: str, architecture: str, ratio: str, group: str, tables: str) -> Recipe:
    flags = _flags(size, architecture, ratio)
    source = f"{PAPER}, {tables}"
    return Recipe(_name(size, architecture, ratio), _words(size, architecture, flags), flags, source, group)


def _placed(size: str, architecture: str, ratio: str, placement: str) -> Recipe:
    flags = _flags(size, architecture, ratio, placement=placement)
    name = f"paper-{size}-{architecture}-{_dashed(ratio)}-{placement}"
    source = f"{PAPER}, Table {'11' if architecture == 'swa' else '17'}"
    group = f"{size.upper()}, placements of attention ({'Tables 11 and 17' if size == '1b' else 'Table 17'})"
    return Recipe(name, f"{_words(size, architecture, flags)}, {placement}", flags, source, group)


def _mixture(architecture: str) -> Recipe:
    flags = _flags("1b", architecture, _usual("1b", architecture), moe=True)
    words = f"{_words('1b', architecture, flags)}, 8 experts and a shared one"
    name, source = f"paper-1b-{architecture}-moe", f"{PAPER}, Table 8, Table 4"
    return Recipe(name, words, flags, source, "1B, mixtures of experts (Table 4)")


def _long(architecture: str, context: int) -> Recipe:
    """Longer samples on the FLOPs of the Transformer at 8K."""
    per_token = _TOKENS / _tokens(_flags("1b", "llama", "1:0"), 1.0)
    flags = _flags("1b", architecture, _usual("1b", architecture)) | {"--seq-length": context}
    tokens = _tokens(flags, per_token)
    flags |= _length(tokens, context=context)
    words = f"{_words('1b', architecture, flags)}, {tokens / 1e9:.1f} billion tokens"
    name = f"paper-1b-{architecture}-{context // 1024}k"
    return Recipe(name, words, flags, f"{PAPER}, Table 12", "1B, longer samples at equal FLOPs (Table 12)")


@cache
def _scaling(size: str, architecture: str, budget: str) -> Recipe:
    flags = _flags(size, architecture, _usual(size, architecture))
    smallest = round(_tokens(flags, float(_BUDGETS[0])) / _SCALING_BATCH_TOKENS)
    flags |= _length(_tokens(flags, float(budget)), _SCALING_BATCH_TOKENS)
    del flags["--lr-warmup-fraction"]
    flags["--lr-warmup-iters"] = round(_WARMUP * smallest)
    *smaller, largest = _budgets(size, architecture)
    name = f"paper-scaling-{size}-{architecture}" + ("" if budget == largest else f"-{budget}")
    words = f"{_words(size, architecture, flags)}, {budget} FLOPs, {flags['--train-iters']:,} steps"
    if budget == largest:
        words += f"; also {' '.join('-' + b for b in smaller)}"
    return Recipe(
        name, words, flags, f"{PAPER}, Table 8, Tables 14 and 15", "Scaling at equal FLOPs (Tables 14 and 15)"
    )


def _budgets(size: str, architecture: str) -> tuple[str, ...]:
    return _BUDGETS[: _BUDGETS.index(_LARGEST[architecture]) + 1] if size == "100m" else _BUDGETS


def _row(size: str, base: Recipe, row: intra_recipes.Row, group: str) -> Recipe:
    """A row of the paper's design space: a recipe with some flags changed."""
    summary = f"{size.upper()} P:M {base.flags['--block-ratio']}, {row.words}"
    name = f"paper-{size}-intra-{row.name}"
    return Recipe(name, summary, {**base.flags, **row.flags}, f"{PAPER}, {row.source}", f"{size.upper()}, {group}")


def listed() -> list[Recipe]:
    """The paper's recipes in the order of the list."""
    found = []
    for size in _SCALES:
        own_table = {"1b": "Table 8, Table 9", "350m": "Table 8, Table 10"}.get(size, "Table 8")
        for architecture in _ARCHITECTURES:
            ratio = _usual(size, architecture)
            found.append(_model(size, architecture, ratio, f"{size.upper()} (Table 8)", own_table))
    for size, table in (("1b", "Table 9"), ("350m", "Table 10")):
        for architecture, ratios in _RATIOS[size].items():
            group = f"{size.upper()}, other ratios ({table})"
            found += [_model(size, architecture, ratio, group, f"Table 8, {table}") for ratio in ratios]
    for size, placements in _PLACEMENTS.items():
        found += [_placed(size, *row) for row in placements]
    found += [_long(architecture, context) for context in (16384, 32768) for architecture in _ARCHITECTURES]
    found += [_scaling(s, a, _budgets(s, a)[-1]) for s in _SCALES for a in _LARGEST]
    found += [_mixture(architecture) for architecture in ("llama", "mamba", "inter", "intra")]
    known = {r.name: r for r in found}
    names = "norm-scale-fusion-value-output, or a preset"
    for size, scale in intra_recipes.SCALES.items():
        all_p = known[f"paper-{size}-intra-1-0"]
        group = f"designs of P ({scale.table}): {names}"
        found += [_row(size, all_p, row, group) for row in intra_recipes.designs(scale)]
        found += [_row(size, all_p, row, "widths of P (Table 20)") for row in intra_recipes.table_20(scale)]
        if size == "1b":
            rows = [(known[_name(size, "intra", ratio)], row) for ratio, row in intra_recipes.table_21()]
            found += [_row(size, base, row, "placements of P (Table 21)") for base, row in rows]
    return found


def smaller_budgets() -> list[Recipe]:
    """The scaling runs to smaller budgets; those to the largest are listed."""
    return [_scaling(s, a, budget) for s in _SCALES for a in _LARGEST for budget in _budgets(s, a)[:-1]]


def aliases() -> dict[str, str]:
    """Names that say in full what a recipe's name leaves out: its ratio, or the largest budget."""
    found: dict[str, str] = {}
    for size in _SCALES:
        for architecture in ("swa", "inter", "intra"):
            name = f"paper-{size}-{architecture}"
            found |= {f"{name}-{_dashed(ratio)}": name for ratio in ("1:5", _usual(size, architecture))}
        for architecture in _LARGEST:
            name = f"paper-scaling-{size}-{architecture}"
            found[f"{name}-{_budgets(size, architecture)[-1]}"] = name
    return found


def design_of(name: str, preset: str | None) -> str | None:
    """The row of Table 18 or 19 that a preset is; None where the recipe has no such table or names its own ratio."""
    for size in intra_recipes.SCALES:
        if preset in PRESETS and name in (f"paper-{size}-intra", f"paper-{size}-intra-1-0"):
            return f"paper-{size}-intra-{'paper-final' if preset == 'paper' else preset}"
    return None
