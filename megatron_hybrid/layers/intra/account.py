"""Costs of the intra-layer hybrid: ``P``."""

from typing import Any

from megatron_hybrid.accounting.attention_core import (
    angles,
    attention_core_flops,
    cached_positions,
    core_kernel,
    is_masked,
    kernel_in_words,
    keys_and_values,
    masks,
    refuse_dropout,
    rope,
)
from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.accounting.saved import FP32, Rank, Saved, projected_columns
from megatron_hybrid.accounting.saved import norm as saved_norm
from megatron_hybrid.accounting.scan import (
    CONV_WIDTH,
    Convention,
    conv_flops,
    scan_cache,
    scan_exchanges,
    scan_flops,
    scan_kernels,
    scan_saved,
    scan_tensors,
    shared_states,
)
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections, spanning_norm
from megatron_hybrid.layers.account import Account
from megatron_hybrid.layers.attention.account import LONG_ROPE_SETTINGS, ROPE_SETTINGS
from megatron_hybrid.layers.intra.design import AXES, PRESETS, IntraDesign, design
from megatron_hybrid.layers.mamba.account import MAMBA_SETTINGS

WIDTHS = (
    "num_attention_heads",
    "num_query_groups",
    "qk_dim",
    "value_dim",
    "ssm_dim",
    "ssm_head_dim",
    "ssm_groups",
    "state_dim",
    "norm_groups",
)
"""Fields of the design that shapes show."""


class IntraAccount(Account):
    """``P``. Its own sizes are an :class:`IntraDesign`."""

    empty_mlp = True
    recompute = {"--hybrid-recompute": ("ssm", "intra")}
    stored_settings = (*ROPE_SETTINGS, *LONG_ROPE_SETTINGS, *MAMBA_SETTINGS, "intra_window", "intra_sinks")
    may_differ = tuple(f"intra_{axis}" for axis in AXES)

    def sizes(self, args: Any) -> IntraDesign:
        return design(args)

    def design(self, s: Sizes) -> IntraDesign:
        """The design with the widths of these sizes."""
        return s.of(self.symbol)

    def linears(self, s: Sizes) -> list[Linear]:
        d = self.design(s)
        return [(s.hidden, sum(part.rows for part in d.in_parts)), (sum(d.out_parts.values()), s.hidden)]

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        """Branches, fusion, input projection with the rows that ranks share (layers/parts.py), output."""
        all_ranks, d = self.design(whole), self.design(s)
        shared = shared_states(all_ranks.ssm_groups, d.state_dim, tp)
        own_states = 0 if shared else 2 * d.ssm_groups * d.state_dim
        branches = scan_tensors(d.ssm_dim + own_states, d.ssm_heads, shared) * d.branches.count("mamba")
        split = sum(part.local_rows(tp) for part in all_ranks.in_parts if not part.is_shared(tp))
        common = sum(part.rows for part in all_ranks.in_parts if part.is_shared(tp))
        project = [s.hidden * split, *([s.hidden * common] if common else [])]
        out = sum(d.out_parts.values()) * s.hidden
        return dense([*norm_sizes(s), *branches, *_fusion_tensors(d), *project, out])

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        """Without an input projection with rows that ranks share, which is torch's (layers/parts.py)."""
        (hidden, width), out = self.linears(s)
        return [(hidden, padded_rows(width, eight_bit=True)), out][not self.reads_in_8_bits(whole, tp) :]

    def reads_in_8_bits(self, whole: Sizes, tp: int) -> bool:
        return not min(part.units for part in self.design(whole).in_parts) < tp

    def conv_flops(self, s: Sizes) -> float:
        d = self.design(s)
        return d.branches.count("mamba") * conv_flops(d.ssm_dim, d.ssm_groups, d.state_dim)

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        d = self.design(s)
        mamba = scan_flops(d.ssm_dim, d.ssm_groups, d.state_dim, s.seq_length, convention)
        return self.attention_flops(s) + d.branches.count("mamba") * mamba

    def attention_flops(self, s: Sizes) -> float:
        """Forward FLOPs per token of the attention branches, without projections."""
        d = self.design(s)
        seen = None if d.window is None else d.window + d.sinks
        return d.branches.count("attention") * attention_core_flops(d.qk_dim, d.value_dim, s.seq_length, seen)

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        """``intra`` runs around the others: with both, a part runs three times."""
        between, attention = self.between_projections(s), self.attention_flops(s)
        parts = {"intra": between, "core_attn": attention, "ssm": between - attention}
        return sum(flops for module, flops in parts.items() if module in modules)

    def cache(self, s: Sizes, length: int) -> Cache:
        """Both branches.

        Two attention branches that share their values keep them once. Values that are the Mamba branch's x save
        nothing: attention reads x before the convolution at every position, the state is made of x behind it, and the
        convolution keeps its own window. They cost more than values of their own, since every query head has its part
        of x: these are not grouped.
        """
        d = self.design(s)
        positions = cached_positions(length, d.window, d.sinks)
        total, kept = Cache(), set()
        for branch, kind in enumerate(d.branches):
            if kind == "mamba":
                total = total.plus(scan_cache(d.ssm_dim, d.ssm_groups, d.state_dim))
                continue
            widths = {"k": d.num_query_groups * d.qk_head_dim, "v": d.value_heads * d.value_head_dim}
            for letter, width in widths.items():
                name = d.part_name(branch, letter)
                if name not in kept:
                    kept.add(name)
                    total = total.plus(Cache(key_value=positions * width))
        return total

    def saved(self, r: Rank) -> list[Saved]:
        d, t, e = self.design(r.s), r.tokens, r.e
        if "attention" in d.branches:
            refuse_dropout(r)
        width = sum(part.rows for part in d.in_parts)
        columns, weight = projected_columns(r, width, min(part.units for part in self.design(r.whole).in_parts))
        projected = Saved("input projection", (t, columns), e)
        out = Saved("fused, input of the output projection", (t, sum(d.out_parts.values())), r.operand)
        if not r.keeps("intra"):
            table = Saved("RoPE: angles", angles(r, d.qk_head_dim), FP32)
            return [*weight, projected, *[table] * (r.settings.rope and "attention" in d.branches), out]
        lines, views = [], False
        for branch, kind in enumerate(d.branches):
            branch_lines, views_of_branch = (
                _attention_saved(r, d, columns) if kind == "attention" else _mamba_saved(r, d)
            )
            # the parts of a branch with a shared value do not stand side by side: it reads a copy (torch.cat)
            if views_of_branch and d.shares_value:
                rows = {part.name: part.rows for part in d.in_parts}
                width = sum(rows[name] for name in d.branch_parts(branch))
                branch_lines = [*branch_lines, Saved("parts of a branch put together", (t, width), e)]
            views = views or (views_of_branch and not d.shares_value)
            lines += [line._replace(name=f"{d.names[branch]}: {line.name}") for line in branch_lines]
        return [*weight, *[projected] * views, *lines, *_fusion_saved(r, d, self.design(r.whole)), out]

    def kernels(self, args: Any) -> str | None:
        d = design(args)
        return kernel_in_words(args, (d.qk_head_dim, d.value_head_dim), d.window) if "attention" in d.branches else None

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        d, local, tp = self.design(m.sizes), self.design(m.local), m.layout.tp
        found = projections(m, shares_rows=not self.reads_in_8_bits(m.sizes, tp))
        for kind in d.branches:
            if kind == "attention":  # keys are repeated where each query head has values of its own
                heads = max(1, d.value_heads // tp)
                found.append(keys_and_values(m, (heads * d.qk_head_dim, heads * d.value_head_dim), "intra"))
            else:
                shape = (local.ssm_dim, d.ssm_head_dim, local.ssm_groups, d.state_dim)
                found += scan_exchanges(m, *shape, "intra")
        inputs = {"none": 0, "group": 2, "fused": len(d.out_parts)}[d.norm]
        groups = [d.groups(i) for i in range(inputs)]
        if any(n % tp for n in groups):
            found.append(spanning_norm(m, sum(groups), "intra"))
        return found

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        d = self.design(s)
        conv = shared_states(d.ssm_groups, d.state_dim, tp) * (CONV_WIDTH + 1)
        rows = sum(part.rows for part in d.in_parts if part.is_shared(tp))
        scales = {"scalar": 2, "diff-lambda": 4 * d.lambda_dim}.get(d.scale, 0)
        return rows * s.hidden + scales + conv * d.branches.count("mamba")

    def not_cut(self, s: Sizes) -> int:
        return norm(s)

    def stored_differences(self, stored: Any, args: Any) -> dict[str, tuple[Any, Any]]:
        """Axes and widths of the design, which several flags and the preset decide together."""
        saved, asked = design(stored), design(args)
        differ = {}
        for field in (*AXES, *WIDTHS):
            both = getattr(saved, field), getattr(asked, field)
            if both[0] != both[1]:
                differ[f"intra_{field}"] = both
        return differ

    def measured(self, args: Any) -> str | None:
        """The mean weight of the second branch, where branches are interpolated."""
        return "megatron_hybrid.layers.intra.fusion:mean_alphas" if design(args).scale == "interpolate" else None

    def describe(self, args: Any) -> dict[str, str]:
        """The axes and, for each kind of branch, its widths."""
        d = design(args)
        values = {axis: getattr(d, axis) for axis in AXES} | {"branches": ",".join(d.branches)}
        preset = next((name for name, axes in PRESETS.items() if axes == values), "no preset's")
        rows = {"P design": f"{preset}: " + ", ".join(f"{axis} {value}" for axis, value in values.items())}
        if "attention" in d.branches:
            window = f", window {d.window} with {d.sinks} sinks" if d.window else ""
            rows["P attention"] = (
                f"{d.num_attention_heads} heads, queries {d.qk_dim} ({d.qk_head_dim} a head), {d.num_query_groups} key "
                f"heads, output {d.value_dim} ({d.value_head_dim} a head) of {d.value_heads} value heads{window}"
            )
        if "mamba" in d.branches:
            rows["P Mamba"] = (
                f"inner width {d.ssm_dim}, {d.ssm_heads} heads of {d.ssm_head_dim}, state {d.state_dim}, "
                f"groups of B and C: {d.ssm_groups}"
            )
        return rows


def _fusion_tensors(d: IntraDesign) -> list[int]:
    """Scales and norms (layers/intra/fusion.py)."""
    widths = [d.width(0), d.width(1)]
    norms = {"none": [], "group": widths, "fused": list(d.out_parts.values())}[d.norm]
    if d.scale == "scalar":
        return [2, *norms]
    if d.scale == "diff-lambda":
        return [4 * d.lambda_dim, *norms]
    return [*norms, *widths] if d.scale == "vector" else norms


def _attention_saved(r: Rank, d: IntraDesign, columns: int) -> tuple[list[Saved], bool]:
    """An attention branch, and whether it keeps views of the input projection's output, which has so many columns."""
    t, e, cp, n = r.tokens, r.e, r.layout.cp, d.num_attention_heads
    widths = d.qk_head_dim, d.value_head_dim
    value_heads, masked = max(1, d.value_heads), is_masked(r, d.window)
    kernel = core_kernel(r.settings, widths, masked, cp > 1)
    lines = rope(r, d.qk_head_dim, one_kernel=not r.cpu)
    before = [Saved("q", (t, n * widths[0]), e), Saved("k", (t, value_heads * widths[0]), e)] * r.settings.rope
    if not r.keeps("core_attn"):
        return [*lines, *before], True
    if masked and widths[0] != widths[1] and r.cpu:
        raise ValueError(
            f"P: a window on CPU with query heads of {widths[0]} and value heads of {widths[1]} is not "
            "counted (torch stores the scores): make them equal, or count for --device cuda."
        )
    lines += [Saved("log-sum-exp", (t, n), FP32), *masks(r, d.window)]
    q = Saved("q", (t, n * widths[0]), e)
    k, v = (Saved(name, (t * cp, value_heads * width), e) for name, width in zip("kv", widths, strict=True))
    out = Saved("output", (t, n * widths[1]), e)
    if kernel == "flex":
        return [*lines, q, k, v, out], False
    if is_padded(kernel, d):
        wide = max(widths)
        # each chunk of queries pads the keys that it sees: of the rank with most, 2 cp + 1 chunks of them
        keys = t if cp == 1 else t * (2 * cp + 1) / 2
        lines += [Saved("q padded", (t, n * wide), e), Saved("k, v padded", (2, keys, value_heads * wide), e)]
        return [*lines, Saved("output", (t, n * wide), e)], False
    if cp > 1:  # k and v of all ranks
        return [*lines, *before[:1], k, v, out], not r.settings.rope
    if kernel != "sdpa" and columns * e % 16:  # rows do not suit cuDNN and Triton: copied (kernels/alignment.py)
        return [*lines, q, k, v, out], False
    return [*lines, *before, out], True


def is_padded(kernel: str, d: IntraDesign) -> bool:
    """Whether the kernel wants one head size for Q, K and V."""
    return kernel == "sdpa" and d.qk_head_dim != d.value_head_dim


def _mamba_saved(r: Rank, d: IntraDesign) -> tuple[list[Saved], bool]:
    """A Mamba branch, and whether it keeps views of the input projection's output."""
    if not r.keeps("ssm") or scan_kernels(r) == "triton" and r.layout.cp == 1:
        return [], True
    return scan_saved(r, d.ssm_heads, d.ssm_head_dim, d.ssm_groups, d.state_dim), False


def _fuses_in_one_pass(r: Rank, d: IntraDesign, whole: IntraDesign) -> bool:
    """Whether norms and scales are steps of the kernel that fuses, which keeps its inputs (``kernels/branches.py``)."""
    spans = any(whole.groups(branch) % r.layout.tp for branch in (0, 1))
    if r.cpu or d.norm != "group" or spans or d.scale in ("gate", "interpolate"):
        return False
    concatenated = "fused" not in d.out_parts or d.fusion == "concat"
    return concatenated or d.width(0) // d.groups(0) == d.width(1) // d.groups(1)


def _fusion_saved(r: Rank, d: IntraDesign, whole: IntraDesign) -> list[Saved]:
    """Norm, scale and fusion (``layers/intra/fusion.py``): each product keeps what it multiplies."""
    t, e = r.tokens, r.e
    lines: list[Saved] = []
    for branch, name in enumerate(d.names):
        width = d.width(branch)
        # the attention's output itself, rather than a copy of it in another order
        kernel = core_kernel(r.settings, (d.qk_head_dim, d.value_head_dim), is_masked(r, d.window), r.layout.cp > 1)
        is_output = d.branches[branch] == "attention" and r.layout.cp == 1 and r.keeps("core_attn")
        is_output = is_output and kernel != "flex" and not is_padded(kernel, d)
        if d.norm == "group":
            lines += saved_norm(r, t, width, False, d.groups(branch))[is_output and r.norm_bytes == e :]
        scaled = d.scale in ("vector", "scalar") or (d.scale == "diff-lambda" and branch == 1)
        if (d.norm == "group" or (scaled and not is_output)) and not _fuses_in_one_pass(r, d, whole):
            lines.append(Saved(f"{name}: before its scale", (t, width), e))
        if d.scale in ("gate", "interpolate"):
            lines.append(Saved(f"{name}: before its gate", (t, width), e))
    if d.norm == "fused":
        width = sum(d.out_parts.values())
        lines += [
            *saved_norm(r, t, width, False, d.groups(0) * len(d.out_parts)),
            Saved("before the fused norm's weight", (t, width), e),
        ]
    return lines
