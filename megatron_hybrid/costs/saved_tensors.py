"""What one layer keeps for its backward pass on one rank: a table of tensors for each kind of layer.

Each line is one storage: views of a tensor are kept with the tensor and stand there once; parameters and vectors of
their size stand nowhere. Measured (``tests/costs/test_activations_measured.py``) are the tables of ``device`` cpu with
``backend`` torch. Derived from reading are those of cuda: torch's fused RMSNorm and flash attention, FlexAttention
(``kernels/attention.py``), Megatron's fused activations (core/fusions/fused_bias_swiglu.py), mamba_ssm's
``MambaSplitConv1dScanCombinedFn`` (ops/triton/ssd_combined.py), Transformer Engine's ``LayerNormLinear``, which keeps
the norm's input and output as a norm and a linear do, and flash-linear-attention's ``ChunkGatedDeltaRuleFunction``.
"""

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

from megatron_hybrid.costs.activation_settings import ActivationSettings
from megatron_hybrid.costs.layout import Layout
from megatron_hybrid.costs.parameters import DELTA_CHUNK, SSD_CHUNK, intra
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.layers.intra.design import IntraDesign
from megatron_hybrid.pattern import LAYERS

FP32 = 4
"""Bytes."""


class Saved(NamedTuple):
    """One storage that is kept."""

    name: str
    shape: tuple[Any, ...]
    each: float
    """Bytes of an element."""

    @property
    def bytes(self) -> float:
        return prod(self.shape) * self.each


@dataclass(frozen=True)
class Rank:
    """One rank's share of a layer and of a micro-batch."""

    whole: Sizes
    layout: Layout
    settings: ActivationSettings

    @property
    def s(self) -> Sizes:
        return self.layout.shard(self.whole)

    @property
    def tokens(self) -> int:
        """That the rank's layers see between their projections."""
        return self.layout.tokens(self.whole.seq_length)

    @property
    def rows(self) -> int:
        """Tokens of the rank's hidden state."""
        return self.tokens // self.layout.tp if self.layout.sequence_parallel else self.tokens

    @property
    def e(self) -> int:
        return self.settings.bytes_each

    @property
    def cpu(self) -> bool:
        return self.settings.device == "cpu"

    @property
    def norm_bytes(self) -> int:
        """On CPU torch's RMSNorm works on an fp32 copy and keeps that; its fused kernel keeps the input itself."""
        return FP32 if self.cpu else self.e

    def keeps(self, module: str) -> bool:
        return module not in self.settings.recompute.modules


def norm(r: Rank, rows: float, width: float, weight: bool = True, groups: float = 1) -> list[Saved]:
    """RMSNorm of [rows, width] in groups; on CPU its weight multiplies a tensor that is kept too."""
    lines = [Saved("norm: input", (rows, width), r.norm_bytes), Saved("norm: 1 / rms", (rows, groups), FP32)]
    return lines + [Saved("norm: normalised", (rows, width), FP32)] * (weight and r.cpu)


def layer(symbol: str, r: Rank) -> list[Saved]:
    """The table of a layer, its input norm and its residual included."""
    tables = {"M": _mamba, "P": _intra, "-": _dense, "E": _experts, "G": _delta}
    if symbol not in LAYERS:
        raise ValueError(f"{symbol!r} is not a layer; the layers are {' '.join(LAYERS)}")
    h = r.whole.hidden
    lines = norm(r, r.rows, h) + [Saved("norm: output, input of the projection", (r.rows, h), r.e)]
    lines += _attention(r, symbol) if symbol in "*W" else tables[symbol](r)
    if not r.keeps("mlp") and symbol in "*WPG" and r.norm_bytes != r.e:
        # upstream recomputes the empty FFN of these layers too; in fp32 and on CUDA its input is the next norm's
        lines.append(Saved("output", (r.rows, h), r.e))
    if r.settings.dropout:
        lines.append(Saved("dropout mask", (r.rows, h), r.e if r.cpu else 1))
    return lines


# Attention ---------------------------------------------------------------------------------------


def _rope(r: Rank, head_dim: int) -> list[Saved]:
    """Sines and cosines for q and k each (core/models/common/embeddings/rope_utils.py)."""
    return [Saved("RoPE: cos, sin of q, k", (4, *_angles(r, head_dim)), r.e)] * r.settings.rope


def _angles(r: Rank, head_dim: int) -> tuple[int, int]:
    """Positions, and channels that turn (core/models/common/embeddings/rotary_pos_embedding.py)."""
    return r.whole.seq_length // r.layout.cp, int(head_dim * r.settings.rotary_percent)


def _is_masked(r: Rank, seen: int | None) -> bool:
    """Whether a query does not see all keys before it (``kernels/attention.py``; seen is the window alone)."""
    return r.settings.packed or (seen is not None and seen < r.whole.seq_length)


def _masks(r: Rank, seen: int | None) -> list[Saved]:
    """The CPU's masks, of q's dtype, for each chunk of queries and all keys up to its end, of the rank with most."""
    length, cp = r.whole.seq_length, r.layout.cp
    if not r.cpu or (cp == 1 and not _is_masked(r, seen)):
        return []
    if cp == 1:
        return [Saved("mask", (length, length), r.e)]
    half = length // (2 * cp)  # chunks i and 2 cp - 1 - i of each rank
    return [Saved("masks of two chunks", (half, (2 * cp + 1) * half), r.e)]


def _attention(r: Rank, symbol: str) -> list[Saved]:
    s, t, e, cp = r.s, r.tokens, r.e, r.layout.cp
    seen = s.window if symbol == "W" else None
    te = r.settings.backend == "te" and symbol == "*" and not r.settings.packed
    q, kv = s.heads * s.head_dim, max(1, s.query_groups) * s.head_dim
    projected = q + 2 * kv
    if s.query_groups < 1:  # upstream gathers all ranks' (core/transformer/attention.py:1839)
        projected = (r.whole.heads + 2 * r.whole.query_groups) * s.head_dim
    before = [Saved("q k v projection, of which v is a view", (t, projected), e)]
    # without RoPE q is a copy all the same where key heads interrupt it: its heads are made one dimension
    rotated = [Saved("q", (t, q), e)] * (r.settings.rope or s.query_groups > 1)
    rotated += [Saved("k after RoPE", (t, kv), e)] * r.settings.rope
    out = Saved("output, input of the output projection", (t, q), e)
    if not r.keeps("core_attn"):
        return [*_rope(r, s.head_dim), *before, *rotated, out]
    core = [Saved("log-sum-exp", (t, s.heads), FP32), *_masks(r, seen)]
    if not r.cpu and _is_masked(r, seen):  # FlexAttention takes contiguous copies
        q_k_v = [Saved("q", (t, q), e), Saved("k, v", (2, t * cp, kv), e)]
        core.append(Saved("output before its transposition", (t, q), e))
    elif cp > 1 and not te:
        q_k_v = [*(rotated[:1] or before), Saved("k, v of all ranks", (2, t * cp, kv), e)]
        core.append(Saved("outputs of two chunks", (t, q), e))
    else:
        q_k_v = before + rotated
    return [*_rope(r, s.head_dim), *q_k_v, *core, out]


# Mamba-2 -----------------------------------------------------------------------------------------


def _scan(r: Rank, heads: int, head_dim: int, groups: int, state: int) -> list[Saved]:
    """Convolution, scan and gate (``kernels/combined.py``); under context parallelism whole samples of fewer heads."""
    cp, e = r.layout.cp, r.e
    t, inner, states = r.tokens * cp, heads * head_dim // cp, max(1, groups // cp) * state
    lines = [Saved("z x B C dt, samples first", (t, 2 * inner + 2 * states + heads // cp), e)]
    if not r.cpu and r.settings.mamba_ssm:
        return [*lines, Saved("scan's output before its gate", (t, inner), e)]
    chunks = r.layout.micro_batch * ceil(r.whole.seq_length / SSD_CHUNK)
    return [
        *lines,
        Saved("dt with bias, its softplus, dt A, clamped", (4, t, heads // cp), FP32),
        Saved("x B C after the convolution", (t, inner + 2 * states), e),
        Saved("state before each chunk", (chunks, inner, state), FP32),
    ]


def _mamba(r: Rank) -> list[Saved]:
    s, t = r.s, r.tokens
    inner = s.mamba_heads * s.mamba_head_dim
    width = 2 * inner + 2 * s.mamba_groups * s.state_dim + s.mamba_heads
    out = Saved("normed, input of the output projection", (t, inner), r.e)
    if not r.keeps("ssm"):
        return [*_shared_rows(r, width, r.whole.mamba_groups), Saved("z x B C dt", (t, width), r.e), out]
    core = _scan(r, s.mamba_heads, s.mamba_head_dim, s.mamba_groups, s.state_dim)
    if r.whole.mamba_groups >= r.layout.tp:
        gated_norm = norm(r, t, inner, groups=s.mamba_groups)
    else:  # layers/norm.py: the group's squares are summed over ranks, and the input converted twice
        copies = 1 if r.e == FP32 else 2
        gated_norm = [Saved("norm: input", (copies, t, inner), FP32), Saved("norm: normalised", (t, inner), r.e)]
    return [*_shared_rows(r, width, r.whole.mamba_groups), *core, *gated_norm, out]


def _shared_rows(r: Rank, width: int, fewest_units: int) -> list[Saved]:
    """The input projection's weight where ranks share rows of it: put together anew in each pass (layers/parts.py)."""
    return [Saved("weight of own and shared rows", (width, r.whole.hidden), r.e)] * (fewest_units < r.layout.tp)


# The intra-layer hybrid --------------------------------------------------------------------------


def _intra(r: Rank) -> list[Saved]:
    d, t, e = intra(r.s), r.tokens, r.e
    width = sum(part.rows for part in d.in_parts)
    projected = Saved("input projection", (t, width), e)
    weight = _shared_rows(r, width, min(part.units for part in intra(r.whole).in_parts))
    out = Saved("fused, input of the output projection", (t, sum(d.out_parts.values())), e)
    if not r.keeps("intra"):
        angles = Saved("RoPE: angles", _angles(r, d.qk_head_dim), FP32)
        return [*weight, projected, *[angles] * (r.settings.rope and "attention" in d.branches), out]
    lines, views = [], False
    for branch, kind in enumerate(d.branches):
        branch_lines, views_of_branch = _intra_attention(r, d) if kind == "attention" else _intra_mamba(r, d)
        # the parts of a branch with a shared value do not stand side by side: it reads a copy (torch.cat)
        if views_of_branch and d.shares_value:
            rows = {part.name: part.rows for part in d.in_parts}
            width = sum(rows[name] for name in d.branch_parts(branch))
            branch_lines = [*branch_lines, Saved("parts of a branch put together", (t, width), e)]
        views = views or (views_of_branch and not d.shares_value)
        lines += [line._replace(name=f"{d.names[branch]}: {line.name}") for line in branch_lines]
    return [*weight, *[projected] * views, *lines, *_fusion(r, d), out]


def _intra_attention(r: Rank, d: IntraDesign) -> tuple[list[Saved], bool]:
    """An attention branch, and whether it keeps views of the input projection's output."""
    t, e, cp, n = r.tokens, r.e, r.layout.cp, d.num_attention_heads
    wide = max(d.qk_head_dim, d.value_head_dim)
    value_heads = max(1, d.value_heads)
    padded, masked = d.qk_head_dim != d.value_head_dim, _is_masked(r, d.window)
    lines = _rope(r, d.qk_head_dim)
    before = [Saved("q", (t, n * d.qk_head_dim), e), Saved("k", (t, value_heads * d.qk_head_dim), e)] * r.settings.rope
    if not r.keeps("core_attn"):
        return [*lines, *before], True
    if masked and padded and r.cpu:
        raise ValueError(
            f"P: a window on CPU with query heads of {d.qk_head_dim} and value heads of {d.value_head_dim} is not "
            "counted (torch stores the scores): make them equal, or count for --device cuda."
        )
    lines += [Saved("log-sum-exp", (t, n), FP32), *_masks(r, d.window)]
    if masked and not r.cpu:
        lines += [Saved("q", (t, n * d.qk_head_dim), e), Saved("k", (t * cp, value_heads * d.qk_head_dim), e)]
        lines += [Saved("v", (t * cp, value_heads * d.value_head_dim), e), Saved("o", (t, n * d.value_head_dim), e)]
        return lines, False
    if padded:
        # each chunk of queries pads the keys that it sees: of the rank with most, 2 cp + 1 chunks of them
        keys = t if cp == 1 else t * (2 * cp + 1) / 2
        lines += [Saved("q padded", (t, n * wide), e), Saved("k, v padded", (2, keys, value_heads * wide), e)]
        return [*lines, Saved("output", (t, n * wide), e)], False
    if cp == 1:
        return [*lines, *before, Saved("output", (t, n * wide), e)], True
    lines += [*before[:1], Saved("k, v of all ranks", (2, t * cp, value_heads * wide), e)]
    return [*lines, Saved("output", (t, n * wide), e)], not r.settings.rope


def _intra_mamba(r: Rank, d: IntraDesign) -> tuple[list[Saved], bool]:
    if not r.keeps("ssm"):
        return [], True
    return _scan(r, d.ssm_heads, d.ssm_head_dim, d.ssm_groups, d.state_dim), False


def _fusion(r: Rank, d: IntraDesign) -> list[Saved]:
    """Norm, scale and fusion (``layers/intra/fusion.py``): each product keeps what it multiplies."""
    t, e = r.tokens, r.e
    lines: list[Saved] = []
    for branch, name in enumerate(d.names):
        width = d.width(branch)
        # the attention's output itself, rather than a copy of it in another order
        is_output = d.branches[branch] == "attention" and d.qk_dim == d.value_dim and r.layout.cp == 1
        is_output = is_output and r.keeps("core_attn") and (r.cpu or not _is_masked(r, d.window))
        if d.norm == "group":
            lines += norm(r, t, width, False, d.groups(branch))[is_output and r.norm_bytes == e :]
        scaled = d.scale in ("vector", "scalar") or (d.scale == "diff-lambda" and branch == 1)
        if d.norm == "group" or (scaled and not is_output):
            lines.append(Saved(f"{name}: before its scale", (t, width), e))
        if d.scale in ("gate", "interpolate"):
            lines.append(Saved(f"{name}: before its gate", (t, width), e))
    if d.norm == "fused":
        width = sum(d.out_parts.values())
        lines += [
            *norm(r, t, width, False, d.groups(0) * len(d.out_parts)),
            Saved("before the fused norm's weight", (t, width), e),
        ]
    return lines


# Feed-forward layers -----------------------------------------------------------------------------


def _ffn(r: Rank, rows: float, width: float, routed: bool = False) -> list[Saved]:
    """Between the two projections of an FFN (core/transformer/mlp.py:329): [rows, width] each."""
    lines = [Saved("first projection", (1 + r.s.gated, rows, width), r.e)]
    if not (r.settings.fused_activation and not r.cpu):
        if r.s.gated:
            lines.append(Saved("activated gate, gated half", (2, rows, width), r.e))
        if routed:
            lines.append(Saved("before the routing probability", (rows, width), r.e))
    return [*lines, Saved("input of the second projection", (rows, width), r.e)]


def _dense(r: Rank) -> list[Saved]:
    return _ffn(r, r.tokens, r.s.ffn) if r.keeps("mlp") else []


def _experts(r: Rank) -> list[Saved]:
    """Routed evenly. Names and orders of routing are of core/transformer/moe/{moe_utils,token_dispatcher}.py."""
    if not r.keeps("moe"):
        return []
    s, t, e = r.s, r.rows, r.e
    n = t * s.topk * r.layout.etp  # the ranks of an expert gather each other's tokens
    lines = [
        Saved("router's scores", (t, s.experts), FP32),
        Saved("chosen experts", (t, s.topk), 8),
        Saved("their scores, and the sum", (t, s.topk + 1), FP32),
        Saved("order of tokens by expert, in which it is sorted", (s.experts, t), 8),
        Saved("order of tokens by expert", (t, s.topk), 8),
        Saved("tokens by expert", (n, s.hidden), e),
        Saved("routing probabilities", (n,), FP32),
        *_ffn(r, n, s.expert_ffn, routed=True),
    ]
    if s.shared_ffn and r.keeps("shared_experts"):
        lines += [line._replace(name=f"shared: {line.name}") for line in _ffn(r, r.tokens, s.shared_ffn)]
        if s.shared_gate:  # core/transformer/moe/shared_experts.py, ``SharedExpertMLP.forward``
            lines += [Saved("shared: before its gate", (t, s.hidden), e), Saved("shared: its gate", (t,), e)]
    return lines


# Gated delta net ---------------------------------------------------------------------------------


def _delta(r: Rank) -> list[Saved]:
    """core/ssm/gated_delta_net/{gdn,common}.py; under context parallelism whole samples of fewer heads."""
    s, cp, e, b = r.s, r.layout.cp, r.e, r.layout.micro_batch
    t, value_heads = r.tokens * cp, s.delta_value_heads / cp
    qk, v = s.delta_key_heads * s.delta_key_dim / cp, value_heads * s.delta_value_dim
    taps = s.delta_conv_width - 1
    lines = [
        Saved("q k v, samples first", (t, 2 * qk + v), e),
        Saved("q k v after the convolution", (t + b * taps, 2 * qk + v), e),
        Saved("q, k before their norms", (t, 2 * qk), e),
        Saved("q, k: 1 / norm", (2, t, s.delta_key_heads / cp), e),
        Saved("decay's factors", (2, t, value_heads), FP32),
        Saved("beta", (t, value_heads), e),
    ]
    gated_norm = [
        *norm(r, t * value_heads, s.delta_value_dim),
        Saved("normed, its gate, the gate activated", (t, v, 1), e + 2 * FP32),
        Saved("input of the output projection", (r.tokens, v * cp), e),
    ]
    return [*lines, *(_delta_rule if r.cpu else _fla_delta_rule)(r, t, value_heads), *gated_norm]


def _delta_rule(r: Rank, tokens: float, heads: float) -> list[Saved]:
    """The plain torch path, in fp32 and padded to whole chunks; ``c`` tokens of a chunk."""
    s, c = r.s, DELTA_CHUNK
    chunks = tokens / r.whole.seq_length * ceil(r.whole.seq_length / c)
    t, dk, dv = chunks * c, s.delta_key_dim, s.delta_value_dim
    triangle = (c - 1) * c * (c + 1) // 3  # sum of i (i + 1), i < c: rows and squares of the inversion's loop
    return [
        Saved("q, k", (2, t, heads, dk), FP32),
        Saved("v", (t, heads, dv), FP32),
        Saved("k beta; k beta decayed; k to the chunk's end; q decayed; k decayed", (5, t, heads, dk), FP32),
        Saved("v beta; v new", (2, t, heads, dv), FP32),
        Saved("beta, decays", (4, t, heads), FP32),
        Saved("decays; decays masked; k k; inverse; q k; q k masked", (6, t, heads, c), FP32),
        Saved("rows of the inversion's loop", (chunks, heads, triangle), FP32),
        Saved("state before each chunk", (chunks, heads, dk, dv), FP32),
    ]


def _fla_delta_rule(r: Rank, tokens: float, heads: float) -> list[Saved]:
    s = r.s
    return [
        Saved("q, k of each value head", (2, tokens, heads, s.delta_key_dim), r.e),
        Saved("v", (tokens, heads, s.delta_value_dim), r.e),
        Saved("decays", (tokens, heads), FP32),
        Saved("inverse", (tokens, heads, DELTA_CHUNK), r.e),
    ]
