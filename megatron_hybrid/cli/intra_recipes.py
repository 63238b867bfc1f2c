"""The paper's design space of the intra-layer hybrid, at 1B and 350M: its Tables 18 to 21 as rows of flags.

Source of names, axes, numbers of blocks and printed widths: arXiv:2510.04800v3. The paper prints the widths of its own
design alone: at 1B in Table 8 (queries and keys 1152, V 2048, SSM 2304), of 350M models of ``P`` alone in Table 20
(queries and keys 896, SSM 1792; V is the hidden size), which is wider than the ``P`` of its 350M hybrids (768 and
1536). Tables 18 and 19 give other designs more blocks, so that all have as many parameters. Widths that it doesn't
print are OURS, chosen to land near the non-embedding parameters of its own design at the printed number of blocks (1B:
0.945 to 0.973 for 0.952 billion; 350M: 0.344 to 0.360 for 0.355):

- one output projection for a sum or a difference wants branches of equal width: V = SSM = hidden size, one block more;
- the same with a shared value: V = SSM = 1536 at 1B, 1280 at 350M, two blocks more;
- Differential Transformer: Llama's attention (Table 8) cut in two, queries 2 x half the hidden size, one V of the
  hidden size, three blocks more;
- Differential Mamba: SSM 2 x 1792 at 1B, 2 x 1408 at 350M.

The row of two attentions that are added (T/T, lambda, add) is Differential Transformer with a sum in place of the
difference, norm and all; that is our reading.

Table 20 moves width between the branches at fixed V. Its ``d_inner`` is half of our SSM width: its second row is the
paper's own design, 1152 at 1B, and 640 channels of queries and a quarter as many of keys weigh 800 x 2048, as much as
128 of its ``d_inner`` only if each stands for two channels of z, x and the output: 768 x 2048. The rows then have 0.952
to 0.959 billion parameters at 1B, 0.352 to 0.364 at 350M. The printed FLOPs spread more than those of these widths (1B:
4.5e20 down to 3.6e20 against 4.2e20 to 3.9e20); the paper doesn't say what else differs.

Tensor-parallel ranks take whole heads. There are 16 attention heads, and SSM heads of 128 as in the paper: widths of
2048 allow up to 16 ranks, 2560 and 1536 up to 4; 1280, 1792, 2304 and 2816 make 10, 14, 18 and 22 heads, which allow 2,
and 1408 makes 11, which allow one.

This module imports neither torch nor Megatron.
"""

from typing import NamedTuple

from megatron_hybrid.layers.intra.design import AXES, PRESETS


class Scale(NamedTuple):
    """Widths of ``P`` at one of the paper's sizes."""

    table: str
    """The table of designs."""
    stated: str
    """Where the widths of the paper's own design stand."""
    blocks: int
    own: tuple[int, int, int]
    """Of queries and keys, V and SSM in the paper's own design, all blocks ``P``."""
    hidden: int
    shared: int
    """V = SSM of designs with a shared value."""
    mambas: int
    """SSM of each branch of Differential Mamba."""
    table_20: tuple[tuple[int, int], ...]
    """Widths of queries and keys, and the table's ``d_inner``."""


SCALES = {
    "1b": Scale(
        "Table 18", "Table 8", 13, (1152, 2048, 2304), 2048, 1536, 1792,
        ((1792, 1024), (1152, 1152), (512, 1280), (128, 1408)),
    ),
    "350m": Scale(
        "Table 19", "Table 20", 11, (896, 1536, 1792), 1536, 1280, 1408,
        ((1408, 768), (896, 896), (512, 1024), (128, 1152)),
    ),
}  # fmt: skip

_NAMED: dict[str, dict[str, str]] = {
    "diff-transformer": {"--intra-preset": "diff-transformer"},
    "diff-transformer-add": {"--intra-preset": "diff-transformer", "--intra-fusion": "add"},
    "diff-mamba": {"--intra-preset": "diff-mamba"},
    "hymba": {"--intra-preset": "hymba"},
    "falcon-h1": {"--intra-preset": "falcon-h1"},
    "paper-final": {"--intra-preset": "paper"},
}
"""Rows of Tables 18 and 19 that stand near a preset."""

_UNNAMED = [
    ("none", "diff-lambda", "diff", "shared", "joint"),
    ("group", "diff-lambda", "diff", "shared", "joint"),
    ("none", "diff-lambda", "diff", "separate", "joint"),
    ("group", "diff-lambda", "diff", "separate", "joint"),
    ("group", "diff-lambda", "diff", "separate", "separate"),
    ("none", "none", "add", "separate", "joint"),
    ("group", "none", "add", "separate", "joint"),
    ("none", "vector", "add", "separate", "joint"),
    ("group", "vector", "add", "shared", "joint"),
    ("none", "none", "add", "separate", "separate"),
    ("group", "none", "add", "separate", "separate"),
    ("group", "vector", "add", "separate", "separate"),
    ("none", "none", "diff", "separate", "separate"),
    ("group", "vector", "diff", "separate", "separate"),
    ("group", "none", "diff", "separate", "joint"),
    ("group", "none", "concat", "separate", "joint"),
    ("group", "vector", "concat", "separate", "joint"),
]
"""The others, all of attention and Mamba: norm, scale, fusion, value, output."""


class Row(NamedTuple):
    """A row of a table: what differs from the paper's all-P model, or for Table 21 from that of its ratio."""

    name: str
    """What follows ``paper-1b-intra-`` or ``paper-350m-intra-`` in the recipe's name."""
    flags: dict[str, str | int]
    words: str
    source: str
    """The table, and whose the widths are."""


def designs(scale: Scale) -> list[Row]:
    """Tables 18 and 19. The flags hold the preset or all axes, the number of blocks and the widths."""
    rows = []
    for name, chosen in _NAMED.items():
        axes = PRESETS[chosen["--intra-preset"]] | {a: chosen[f"--intra-{a}"] for a in AXES if f"--intra-{a}" in chosen}
        rows.append(_design(scale, name, chosen, axes))
    for values in _UNNAMED:
        axes = dict(zip(AXES, ("attention,mamba", *values), strict=True))
        rows.append(_design(scale, "-".join(values), {f"--intra-{axis}": axes[axis] for axis in AXES}, axes))
    return rows


def _design(scale: Scale, name: str, chosen: dict[str, str], axes: dict[str, str]) -> Row:
    more, widths = _size(scale, axes)
    qk, value, ssm = widths
    flags: dict[str, str | int] = {**chosen, "--num-blocks": scale.blocks + more, **width_flags(widths)}
    parts = [f"Q and K {qk}, V {value}"] if "attention" in axes["branches"] else []
    parts += [f"SSM {ssm}"] if "mamba" in axes["branches"] else []
    whose = scale.stated if widths == scale.own else "ours"
    words = f"{flags['--num-blocks']} blocks, {', '.join(parts)}"
    return Row(name, flags, words, f"{scale.table}; widths of P: {whose}")


def width_flags(widths: tuple[int, int, int]) -> dict[str, str | int]:
    """Of queries and keys, V, SSM."""
    return dict(zip(("--intra-qk-dim", "--intra-value-dim", "--intra-ssm-dim"), widths, strict=True))


def _size(scale: Scale, axes: dict[str, str]) -> tuple[int, tuple[int, int, int]]:
    """Blocks more than the paper's own design has (printed), and widths; all but the paper's own are ours."""
    qk, value, ssm = scale.own
    if axes["branches"] == "attention,attention":
        return 3, (scale.hidden // 2, value, ssm)
    if axes["branches"] == "mamba,mamba":
        return 0, (qk, value, scale.mambas)
    if axes["output"] == "joint" and axes["fusion"] != "concat":
        return (2, (qk, *2 * (scale.shared,))) if axes["value"] == "shared" else (1, (qk, *2 * (scale.hidden,)))
    return 0, scale.own


def table_20(scale: Scale) -> list[Row]:
    """The widths of queries and keys against those of the SSM branch."""
    rows = []
    for qk, inner in scale.table_20:
        ssm = 2 * inner
        words = f"{scale.blocks} blocks, Q and K {qk}, V {scale.hidden}, SSM {ssm}"
        source = f"Table 20 (its d_inner is {inner}, half of --intra-ssm-dim)"
        rows.append(Row(f"qk{qk}-ssm{ssm}", {"--intra-qk-dim": qk, "--intra-ssm-dim": ssm}, words, source))
    return rows


def table_21() -> list[tuple[str, Row]]:
    """Ratio and row of each placement other than scatter, which the recipes of Table 9 have."""
    return [
        (ratio, Row(f"{name}-{placement}", {"--block-placement": placement}, f"13 blocks, {placement}", "Table 21"))
        for ratio, name in (("1:1", "1-1"), ("1:3", "1-3"), ("1:5", "1-5"))
        for placement in ("cluster", "sandwich")
    ]
