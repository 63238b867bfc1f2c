"""The study's design space of the intra-layer hybrid at 1B: its Tables 18, 20 and 21 as rows of flags.

Source of names, axes, numbers of blocks and printed widths: arXiv:2510.04800v3. The study prints the widths of its own
design alone (Table 8: queries and keys 1152, V 2048, SSM 2304). Table 18 gives other designs more or fewer blocks, so
that all have as many parameters. Widths that it doesn't print are OURS, chosen to land near the 0.95 billion
non-embedding parameters of its own design at the printed number of blocks (0.945 to 0.973):

- one output projection for a sum or a difference wants branches of equal width: V = SSM = 2048, 14 blocks;
- the same with a shared value: V = SSM = 1536, 15 blocks;
- Differential Transformer: Llama's attention (Table 8) cut in two, queries 2 x 1024, one V of 2048, 16 blocks;
- Differential Mamba: SSM 2 x 1792, 13 blocks.

Table 20 moves width between the branches at fixed V. Its ``d_inner`` is half of our SSM width: its second row is the
study's own design, 1152, and 640 channels of queries and a quarter as many of keys weigh 800 x 2048, as much as 128 of
its ``d_inner`` only if each stands for two channels of z, x and the output: 768 x 2048. The four rows then have 0.952
to 0.959 billion parameters. The printed FLOPs, 4.5e20 down to 3.6e20, spread more than those of these widths, 4.2e20
down to 3.9e20; the study doesn't say what else differs.

Tensor-parallel ranks take whole heads. There are 16 attention heads, and SSM heads of 128 as in the study: widths of
2048 allow up to 16 ranks, 2560 and 1536 up to 4; 1792, 2304 and 2816 make 14, 18 and 22 heads, which allow 2.

This module imports neither torch nor Megatron.
"""

from typing import NamedTuple

from megatron_hybrid.intra_design import AXES, PRESETS

_OWN_WIDTHS = (1152, 2048, 2304)
"""Of queries and keys, V and SSM in the study's own design (Table 8)."""

_NAMED = {
    "diff-transformer": ("diff-transformer", 16),
    "diff-mamba": ("diff-mamba", 13),
    "hymba": ("hymba", 14),
    "falcon-h1": ("falcon-h1", 13),
    "paper-final": ("paper", 13),
}
"""Rows of Table 18 that have a name: preset and blocks."""

_UNNAMED = [
    ("none", "diff-lambda", "diff", "shared", "joint", 15),
    ("group", "diff-lambda", "diff", "shared", "joint", 15),
    ("none", "diff-lambda", "diff", "separate", "joint", 14),
    ("group", "diff-lambda", "diff", "separate", "joint", 14),
    ("group", "diff-lambda", "diff", "separate", "separate", 13),
    ("none", "none", "add", "separate", "joint", 14),
    ("group", "none", "add", "separate", "joint", 14),
    ("none", "vector", "add", "separate", "joint", 14),
    ("group", "vector", "add", "shared", "joint", 15),
    ("none", "none", "add", "separate", "separate", 13),
    ("group", "none", "add", "separate", "separate", 13),
    ("group", "vector", "add", "separate", "separate", 13),
    ("none", "none", "diff", "separate", "separate", 13),
    ("group", "vector", "diff", "separate", "separate", 13),
    ("group", "none", "diff", "separate", "joint", 14),
    ("group", "none", "concat", "separate", "joint", 13),
    ("group", "vector", "concat", "separate", "joint", 13),
]
"""The others, all of attention and Mamba: norm, scale, fusion, value, output, and blocks."""


class Row(NamedTuple):
    """A row of a table: what differs from the study's all-P model, or for Table 21 from that of its ratio."""

    name: str
    """What follows ``paper-1b-intra-`` in the recipe's name."""
    flags: dict[str, str | int]
    words: str
    source: str
    """The table, and whose the widths are."""


def table_18() -> list[Row]:
    """The designs. The flags hold the preset or all axes, the number of blocks and the widths."""
    rows = []
    for name, (preset, blocks) in _NAMED.items():
        rows.append(_design(name, {"--intra-preset": preset}, PRESETS[preset], blocks))
    for *values, blocks in _UNNAMED:
        axes = dict(zip(AXES, ("attention,mamba", *values), strict=True))
        rows.append(_design("-".join(values), {f"--intra-{axis}": axes[axis] for axis in AXES}, axes, blocks))
    return rows


def _design(name: str, chosen: dict[str, str], axes: dict[str, str], blocks: int) -> Row:
    qk, value, ssm = widths = _widths(axes)
    flags: dict[str, str | int] = {
        **chosen,
        "--num-blocks": blocks,
        "--intra-qk-dim": qk,
        "--intra-value-dim": value,
        "--intra-ssm-dim": ssm,
    }
    parts = [f"Q and K {qk}, V {value}"] if "attention" in axes["branches"] else []
    parts += [f"SSM {ssm}"] if "mamba" in axes["branches"] else []
    whose = "Table 8" if widths == _OWN_WIDTHS else "ours"
    return Row(name, flags, f"{blocks} blocks, {', '.join(parts)}", f"Table 18; widths of P: {whose}")


def _widths(axes: dict[str, str]) -> tuple[int, int, int]:
    """Queries and keys, V, SSM; all but the study's own are ours."""
    qk, value, ssm = _OWN_WIDTHS
    if axes["branches"] == "attention,attention":
        return 1024, value, ssm
    if axes["branches"] == "mamba,mamba":
        return qk, value, 1792
    if axes["output"] == "joint" and axes["fusion"] != "concat":
        return (qk, 1536, 1536) if axes["value"] == "shared" else (qk, 2048, 2048)
    return qk, value, ssm


def table_20() -> list[Row]:
    """The widths of queries and keys against those of the SSM branch."""
    rows = []
    for qk, inner in ((1792, 1024), (1152, 1152), (512, 1280), (128, 1408)):
        ssm = 2 * inner
        flags: dict[str, str | int] = {"--intra-qk-dim": qk, "--intra-ssm-dim": ssm}
        words = f"13 blocks, Q and K {qk}, V 2048, SSM {ssm}"
        rows.append(
            Row(f"qk{qk}-ssm{ssm}", flags, words, f"Table 20 (its d_inner is {inner}, half of --intra-ssm-dim)")
        )
    return rows


def table_21() -> list[tuple[str, Row]]:
    """Ratio and row of each placement other than scatter, which the recipes of Table 9 have."""
    return [
        (ratio, Row(f"{name}-{placement}", {"--block-placement": placement}, f"13 blocks, {placement}", "Table 21"))
        for ratio, name in (("1:1", "1-1"), ("1:3", "1-3"), ("1:5", "1-5"))
        for placement in ("cluster", "sandwich")
    ]
