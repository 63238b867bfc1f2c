"""The design space of the intra-layer hybrid (symbol P): presets, rules and widths. Pure Python.

    f(X) = W_out( s_1 Norm(B_1(X))  (+)  s_2 Norm(B_2(X)) )

Two branches B_1 and B_2, each attention or Mamba-2, in the order of ``--intra-branches``; scales s, fusion (+), and
either one output projection for each branch or one for both (Bae et al., arXiv:2510.04800, section 3 and table 18).
``docs/design_space.md`` explains each axis and which of them are the same function.

Shapes and sizes here are global, of all tensor-parallel ranks together.
"""

from dataclasses import dataclass, replace
from typing import Any

from megatron_hybrid.accounting.divisibility import check_divides
from megatron_hybrid.accounting.projection import Part

AXES = ("branches", "norm", "scale", "fusion", "value", "output")

# branches, norm, scale, fusion, value, output: as Bae et al., table 18, name and describe them
_PRESETS = {
    "paper": ("attention,mamba", "group", "none", "diff", "separate", "separate"),
    "hymba": ("attention,mamba", "group", "vector", "add", "separate", "joint"),  # arXiv:2411.13676
    "falcon-h1": ("attention,mamba", "none", "none", "concat", "separate", "joint"),  # arXiv:2507.22448
    # arXiv:2410.05258; its norm stands behind the difference
    "diff-transformer": ("attention,attention", "fused", "diff-lambda", "diff", "shared", "joint"),
    "diff-mamba": ("mamba,mamba", "none", "diff-lambda", "diff", "separate", "separate"),  # arXiv:2507.06204
}
PRESETS = {name: dict(zip(AXES, values, strict=True)) for name, values in _PRESETS.items()}
"""Preset to its axes."""


@dataclass(frozen=True, kw_only=True)
class IntraDesign:
    """One point of the design space with its widths; ``IntraConfig`` (cli/config.py) has the fields."""

    branches: tuple[str, str]
    """``attention`` or ``mamba``, twice."""
    norm: str
    scale: str
    fusion: str
    value: str
    output: str
    num_attention_heads: int
    num_query_groups: int
    qk_dim: int
    """Of one attention branch, all query heads together; each key head is as wide as a query head."""
    value_dim: int
    """Output of one attention branch, all heads together."""
    ssm_dim: int
    """Inner width of one Mamba branch."""
    ssm_head_dim: int
    ssm_groups: int
    """Groups of B and C."""
    state_dim: int
    norm_groups: int | None = None
    """Groups that the norm takes in a branch; None: one for each head."""
    window: int | None = None
    sinks: int = 0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_dim // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        return self.value_dim // self.num_attention_heads

    @property
    def ssm_heads(self) -> int:
        return self.ssm_dim // self.ssm_head_dim

    @property
    def names(self) -> tuple[str, str]:
        """What the branches are called in weights and checkpoints: ``attention``, ``mamba``, or with 1 and 2."""
        first, second = self.branches
        return (first, second) if first != second else (f"{first}1", f"{second}2")

    @property
    def shares_value(self) -> bool:
        return self.value == "shared"

    @property
    def value_heads(self) -> int:
        """Heads of V. Values shared with a Mamba branch are its x, of which each query head has its own part."""
        return self.num_attention_heads if self.shares_value and "mamba" in self.branches else self.num_query_groups

    def width(self, branch: int) -> int:
        """Output width of a branch."""
        return self.value_dim if self.branches[branch] == "attention" else self.ssm_dim

    def heads(self, branch: int) -> int:
        """Heads of a branch's output."""
        return self.num_attention_heads if self.branches[branch] == "attention" else self.ssm_heads

    def groups(self, branch: int) -> int:
        """Groups over which the norm of a branch's output goes."""
        return self.norm_groups or self.heads(branch)

    def part_name(self, branch: int, name: str) -> str:
        """The name of an input part of a branch: ``q``, or ``q1`` where the branches are alike.

        A shared value belongs to the first branch that carries it by its own name: ``x`` if there is a Mamba branch,
        else ``v``.
        """
        alike = self.branches[0] == self.branches[1]
        if name in "vx" and self.shares_value:
            return "x" if "mamba" in self.branches else "v"
        return f"{name}{branch + 1}" if alike else name

    def branch_parts(self, branch: int) -> list[str]:
        """Names of the input parts that a branch reads, in the order in which its core wants them."""
        letters = ("q", "k", "v") if self.branches[branch] == "attention" else ("z", "x", "B", "C", "dt")
        return [self.part_name(branch, letter) for letter in letters]

    @property
    def in_parts(self) -> list[Part]:
        """The rows of the fused input projection."""
        found: dict[str, Part] = {}
        for branch, kind in enumerate(self.branches):
            if kind == "attention":
                sizes = {
                    "q": (self.num_attention_heads, self.qk_head_dim),
                    "k": (self.num_query_groups, self.qk_head_dim),
                    "v": (self.value_heads, self.value_head_dim),
                }
            else:
                sizes = {
                    "z": (self.ssm_heads, self.ssm_head_dim),
                    "x": (self.ssm_heads, self.ssm_head_dim),
                    "B": (self.ssm_groups, self.state_dim),
                    "C": (self.ssm_groups, self.state_dim),
                    "dt": (self.ssm_heads, 1),
                }
            for letter, (units, rows) in sizes.items():
                name = self.part_name(branch, letter)
                if letter == "v" and name == "x":
                    continue  # the Mamba branch makes it
                found.setdefault(name, Part(name, units, rows))
        if self.scale in ("gate", "interpolate"):
            found["gate"] = Part("gate", 1, 2 if self.scale == "gate" else 1)
        return list(found.values())

    @property
    def out_parts(self) -> dict[str, int]:
        """Columns of the output projection by name."""
        if self.output == "joint" and self.fusion != "concat":
            return {"fused": self.width(0)}
        return {name: self.width(i) for i, name in enumerate(self.names)}

    def shard(self, tp: int) -> "IntraDesign":
        """The design of one tensor-parallel rank's share: whole heads, and of fewer units than ranks one each."""
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // tp,
            num_query_groups=max(1, self.num_query_groups // tp),
            qk_dim=self.qk_dim // tp,
            value_dim=self.value_dim // tp,
            ssm_dim=self.ssm_dim // tp,
            ssm_groups=max(1, self.ssm_groups // tp),
            norm_groups=max(1, self.norm_groups // tp) if self.norm_groups else None,
        )

    @property
    def lambda_dim(self) -> int:
        """Length of the four vectors of diff-lambda: that of a query head, or of an SSM head without attention."""
        return self.qk_head_dim if "attention" in self.branches else self.ssm_head_dim


def design(args: Any) -> IntraDesign:
    """The design that flags ask for: the preset's axes, each flag on top, and the paper's default widths.

    Args:
        args: Anything with Megatron's and our arguments as attributes; what is absent has its default.

    Raises:
        ValueError: The combination makes no sense, or widths do not divide; with the reason and the remedy.
    """

    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    preset = get("intra_preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"--intra-preset {preset}: the presets are {', '.join(PRESETS)}.")
    axes = {axis: get(f"intra_{axis}", PRESETS[preset][axis]) for axis in AXES}
    branches = tuple(axes.pop("branches").split(","))
    kinds = [("attention", "mamba"), ("attention", "attention"), ("mamba", "mamba")]
    if branches not in kinds:
        raise ValueError(
            f"--intra-branches {','.join(branches)}: choose one of {' '.join(','.join(kind) for kind in kinds)}."
        )
    hidden, heads = args.hidden_size, args.num_attention_heads
    grouped = get("num_query_groups", 1) if get("group_query_attention", False) else heads
    ssm_dim = get("intra_ssm_dim", hidden)
    tied = axes["value"] == "shared" and branches == ("attention", "mamba")
    result = IntraDesign(
        branches=branches,
        **axes,
        num_attention_heads=get("intra_num_attention_heads", max(1, heads // 2)),
        num_query_groups=get("intra_num_query_groups", max(1, grouped // 2)),
        qk_dim=get("intra_qk_dim", hidden // 2),
        value_dim=get("intra_value_dim", ssm_dim if tied else hidden),
        ssm_dim=ssm_dim,
        ssm_head_dim=get("intra_ssm_head_dim", get("mamba_head_dim", 64)),
        ssm_groups=get("mamba_num_groups", 8),
        state_dim=get("mamba_state_dim", 128),
        norm_groups=get("intra_norm_groups"),
        window=get("intra_window"),
        sinks=get("intra_sinks", 0),
    )
    check_axes(result)
    check_widths(result)
    return result


def check_axes(d: IntraDesign) -> None:
    """Refuses combinations of axes that make no sense.

    Raises:
        ValueError: With the reason and the remedy.
    """
    if d.fusion == "concat" and d.output == "separate":
        raise ValueError(
            "--intra-fusion concat --intra-output separate: concatenated branches go through one matrix, so nothing is "
            "left to project separately. It is the same function as --intra-fusion add --intra-output separate, and as "
            "--intra-fusion concat --intra-output joint: take one of these."
        )
    if d.norm == "fused" and d.output == "separate":
        raise ValueError(
            "--intra-norm fused --intra-output separate: the fused norm stands between the fusion and the output "
            "projection, and separate projections come before the fusion. Use --intra-output joint or "
            "--intra-norm group."
        )
    if d.norm == "fused" and d.fusion == "concat" and d.scale not in ("none", "vector"):
        raise ValueError(
            f"--intra-norm fused --intra-fusion concat --intra-scale {d.scale}: the norm of each concatenated branch "
            "takes a common factor of its channels away again. Use --intra-norm group, or --intra-scale none or vector."
        )
    if d.scale == "interpolate" and d.fusion == "diff":
        raise ValueError(
            "--intra-scale interpolate --intra-fusion diff: the weights a and 1 - a mix two branches, and a difference "
            "is no mixture. Use --intra-fusion add or concat, or --intra-scale diff-lambda."
        )
    if (d.window is not None or d.sinks) and "attention" not in d.branches:
        raise ValueError("--intra-window and --intra-sinks need an attention branch, and both branches are mamba.")
    if d.window is not None and d.window < 1 or d.sinks < 0:
        raise ValueError(
            f"--intra-window {d.window} --intra-sinks {d.sinks}: a query sees at least itself (window 1) and no fewer "
            "than 0 sinks."
        )
    if d.sinks and d.window is None:
        raise ValueError(f"--intra-sinks {d.sinks} without --intra-window: full attention sees every key already.")


def check_widths(d: IntraDesign) -> None:
    """Refuses widths that do not fit each other.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    if "attention" in d.branches:
        check_divides(
            d.num_attention_heads, "--intra-num-attention-heads", d.num_query_groups, "--intra-num-query-groups"
        )
        check_divides(d.qk_dim, "--intra-qk-dim", d.num_attention_heads, "--intra-num-attention-heads")
        check_divides(d.value_dim, "--intra-value-dim", d.num_attention_heads, "--intra-num-attention-heads")
    if "mamba" in d.branches:
        check_divides(d.ssm_dim, "--intra-ssm-dim", d.ssm_head_dim, "--intra-ssm-head-dim (default: --mamba-head-dim)")
        check_divides(d.ssm_heads, "the heads of --intra-ssm-dim", d.ssm_groups, "--mamba-num-groups")
    if d.shares_value and d.branches == ("attention", "mamba") and d.value_dim != d.ssm_dim:
        raise ValueError(
            f"--intra-value shared: attention reads the Mamba branch's x as its values, so --intra-value-dim "
            f"{d.value_dim} must equal --intra-ssm-dim {d.ssm_dim}. Drop one of them."
        )
    if "fused" in d.out_parts and d.width(0) != d.width(1):
        raise ValueError(
            f"--intra-output joint with --intra-fusion {d.fusion} takes both branches through one matrix: they must be "
            f"equally wide, and are {d.width(0)} (--intra-value-dim) and {d.width(1)} (--intra-ssm-dim)."
        )
    if d.norm_groups is not None and d.norm == "none":
        raise ValueError(f"--intra-norm-groups {d.norm_groups} with --intra-norm none: there is no norm. Drop one.")
    if d.norm_groups is not None:
        for i, name in enumerate(d.names):
            check_divides(d.width(i), f"the width of the {name} branch", d.norm_groups, "--intra-norm-groups")
