"""Every point of the intra-layer design space against its formula, and against models that others wrote.

Everything runs in fp64, but for A, dt_bias and lambda, which the layer rounds to fp32 and whose gradients come back
through fp32: 6e-8. Where a norm takes the size of a branch away, gradients are small differences of large terms, which
costs up to two digits. A wrong sign, factor, order or place of a norm shows at 1e-3 and more
(`test_the_formula_can_say_no`).
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.kernels.ssd import ssd_recurrence
from megatron_hybrid.layers.intra.design import AXES, IntraDesign, check_axes, check_widths
from tests.support import single
from tests.support.plain_torch import dense_attention, relative_errors, rotate, seen
from tests.support.single import build
from tests.support.training import SIZES

# What the ranks run ---------------------------------------------------------------------------------


def intra_layers(designs: list[Any], length: int, base: float | None = None, depth: int = 2) -> list[dict[str, Any]]:
    """P mixers without norm and residual around them, forward and backward, all of their weights random.

    Args:
        designs: What to build, for a hidden size of 32.
        base: Of RoPE; None for none.
        depth: Mixers in front of the layer.

    Returns:
        As :func:`tests.support.single.layer`, in fp64, and ``depth``.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_hybrid.layers.attention.module import RoPE
    from megatron_hybrid.layers.intra.module import IntraHybrid, IntraSubmodules

    model, _ = build(f"{SIZES} --micro-batch-size 1 --train-iters 1 --lr 1e-3 --hybrid-layer-pattern=P".split())
    submodules = IntraSubmodules(ColumnParallelLinear, RowParallelLinear)
    groups, generator = ProcessGroupCollection.use_mpu_process_groups(), torch.Generator().manual_seed(3)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    found = []
    for design in designs:
        layer = IntraHybrid(
            model.config, submodules, 1, groups, design, RoPE(int(base)) if base else None, (depth,)
        ).double()
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if p.dim() == 1:  # norms, scales, biases, A, D: near what they start from, but no two alike
                    p.add_(0.3 * random(*p.shape))
                else:
                    p.copy_(random(*p.shape) * (0.5 if "conv" in name or "lambda" in name else p.shape[-1] ** -0.5))
        x = random(length, 2, 32).double().requires_grad_()
        y, _ = layer(x)
        dy = random(*y.shape).double()
        names, weights = zip(*layer.named_parameters(), strict=True)
        dx, *gradients = torch.autograd.grad(y, [x, *weights], dy)
        found.append(
            {
                **{name: t.detach().numpy() for name, t in (("x", x), ("y", y), ("dy", dy), ("dx", dx))},
                "weights": {n: w.detach().numpy() for n, w in zip(names, weights, strict=True)},
                "gradients": {n: g.numpy() for n, g in zip(names, gradients, strict=True)},
                "depth": depth,
            }
        )
    return found


# The layer in plain torch, as docs/design_space.md writes it -------------------------------------------

EPS = 1e-5


def formula(
    d: IntraDesign, ours: dict[str, Any], base: float | None = None, partial: bool = False
) -> dict[str, Tensor]:
    """Output and gradients in fp64 from the weights in ``ours``, see :func:`intra_layers`.

    Args:
        base: Of RoPE; None turns nothing.
        partial: Weights of ours may go unused.
    """
    w = {n: torch.tensor(t, dtype=torch.float64, requires_grad=True) for n, t in ours["weights"].items()}
    x = torch.tensor(ours["x"], dtype=torch.float64, requires_grad=True)
    rows = {part.name: part.rows for part in d.in_parts}
    parts = dict(zip(rows, (x @ w["in_proj.weight"].T).split(list(rows.values()), -1), strict=True))

    cores = {"attention": attend, "mamba": scan}
    b = [cores[kind](d, i, [parts[n] for n in d.branch_parts(i)], w, base) for i, kind in enumerate(d.branches)]
    if d.norm == "group":
        b = [rms(t, d.groups(i)) * w[f"fusion.{d.names[i]}_norm.weight"] for i, t in enumerate(b)]
    b = [t * s for t, s in zip(b, scales(d, w, parts, start(ours["depth"])), strict=True)]
    W = w["out_proj.weight"]
    if d.output == "separate":  # what is stored is W_2 for a sum and -W_2 for a difference: one function of the weights
        W1, W2 = W.split([d.width(0), d.width(1)], 1)
        y = b[0] @ W1.T + b[1] @ W2.T if d.fusion == "add" else b[0] @ W1.T - b[1] @ (-W2).T
    else:
        fused = [b[0] + b[1]] if d.fusion == "add" else [b[0] - b[1]] if d.fusion == "diff" else b
        if d.norm == "fused":
            factor = 1 - start(ours["depth"]) if d.scale == "diff-lambda" else 1
            fused = [
                factor * rms(t, d.groups(i)) * w[f"fusion.{n}_norm.weight"]
                for i, (t, n) in enumerate(zip(fused, d.out_parts, strict=True))
            ]
        y = torch.cat(fused, -1) @ W.T
    names = list(w)
    dy = torch.tensor(ours["dy"], dtype=torch.float64)
    dx, *gradients = torch.autograd.grad(y, [x, *w.values()], dy, allow_unused=partial)
    return {"y": y, "dx": dx, **{f"d {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}}


def start(depth: int) -> float:
    """lambda_init: Ye et al., arXiv:2410.05258, section 2.1."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def scales(d: IntraDesign, w: dict[str, Tensor], parts: dict[str, Tensor], lambda_init: float) -> list[Any]:
    if d.scale == "vector":
        return [w[f"fusion.{n}_scale.weight"] for n in d.names]
    if d.scale == "scalar":
        return list(w["fusion.scalars"])
    if d.scale == "gate":
        return list(torch.sigmoid(parts["gate"]).split(1, -1))
    if d.scale == "interpolate":
        alpha = torch.sigmoid(parts["gate"])
        return [1 - alpha, alpha]
    if d.scale == "diff-lambda":
        q1, k1, q2, k2 = w["fusion.lambdas"].chunk(4)
        return [1, torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + lambda_init]
    return [1, 1]


def rms(t: Tensor, groups: int) -> Tensor:
    """Over groups of channels, without a weight."""
    t = t.unflatten(-1, (groups, -1))
    return (t / (t.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2)


def attend(d: IntraDesign, i: int, qkv: list[Tensor], w: dict[str, Tensor], base: float | None) -> Tensor:
    """Causal attention, each query head with the key and value head of its group."""
    widths = (d.qk_head_dim, d.qk_head_dim, d.value_head_dim)
    q, k, v = (t.unflatten(-1, (-1, width)) for t, width in zip(qkv, widths, strict=True))
    if base:
        q, k = rotate(q, base), rotate(k, base)
    return dense_attention(q, k, v, seen(len(q), d.window, d.sinks)).flatten(-2)


def scan(d: IntraDesign, i: int, zxbcdt: list[Tensor], w: dict[str, Tensor], base: float | None) -> Tensor:
    """Mamba-2 between its projections: convolution, recurrence, gate (Dao and Gu, arXiv:2405.21060)."""
    z, x, B, C, dt = zxbcdt
    name = d.names[i]
    kernel, bias = w[f"{name}.conv1d_weight"], w[f"{name}.conv1d_bias"]
    padded = F.pad(torch.cat([x, B, C], -1).permute(1, 2, 0), (kernel.shape[-1] - 1, 0))
    mixed = F.silu(F.conv1d(padded, kernel, bias, groups=len(kernel))).transpose(1, 2)
    states = d.ssm_groups * d.state_dim
    u, B, C = mixed.split([d.ssm_dim, states, states], -1)
    y = ssd_recurrence(
        u.unflatten(-1, (d.ssm_heads, -1)),
        dt.transpose(0, 1),
        -w[f"{name}.A_log"].float().exp().double(),  # upstream hands A and dt_bias to its kernel in fp32
        B.unflatten(-1, (d.ssm_groups, -1)),
        C.unflatten(-1, (d.ssm_groups, -1)),
        D=w[f"{name}.D"],
        dt_bias=w[f"{name}.dt_bias"].float().double(),
        dt_softplus=True,
    )
    return y.transpose(0, 1).flatten(-2) * F.silu(z)


# Tests ----------------------------------------------------------------------------------------------

RTOL = 1e-5
TINY = {
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "qk_dim": 12,
    "value_dim": 16,
    "ssm_dim": 16,
    "ssm_head_dim": 4,
    "ssm_groups": 2,
    "state_dim": 4,
}
CHOICES = {
    "branches": [("attention", "mamba"), ("attention", "attention"), ("mamba", "mamba")],
    "norm": ["none", "group", "fused"],
    "scale": ["none", "vector", "scalar", "gate", "interpolate", "diff-lambda"],
    "fusion": ["add", "diff", "concat"],
    "value": ["separate", "shared"],
    "output": ["separate", "joint"],
}


def makes_sense(point: dict[str, Any]) -> bool:
    """The rules as docs/design_space.md states them."""
    if point["output"] == "separate" and (point["fusion"] == "concat" or point["norm"] == "fused"):
        return False
    if point["norm"] == "fused" and point["fusion"] == "concat" and point["scale"] not in ("none", "vector"):
        return False
    return not (point["scale"] == "interpolate" and point["fusion"] == "diff")


POINTS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*(CHOICES[axis] for axis in AXES))]
ALLOWED = [point for point in POINTS if makes_sense(point)]


def test_what_makes_no_sense_is_refused_and_nothing_else():
    for point in POINTS:
        design = IntraDesign(**point, **TINY)
        if makes_sense(point):
            check_axes(design)
            check_widths(design)
        else:
            with pytest.raises(ValueError, match="--intra-"):
                check_axes(design)
    assert len(ALLOWED) == 414


@pytest.mark.parametrize("value", CHOICES["value"])
@pytest.mark.parametrize("branches", CHOICES["branches"], ids="-".join)
def test_every_point_is_its_formula(ranks, branches, value):
    designs = [IntraDesign(**p, **TINY) for p in ALLOWED if p["branches"] == branches and p["value"] == value]
    assert len(designs) == 69
    for design, ours in zip(designs, ranks(1).run(intra_layers, designs=designs, length=7)[0], strict=True):
        wrong = {k: f"{v:.1e}" for k, v in relative_errors(ours, formula(design, ours)).items() if not v <= RTOL}
        assert not wrong, design


PAPER = IntraDesign(
    branches=("attention", "mamba"),
    norm="group",
    scale="none",
    fusion="diff",
    value="separate",
    output="separate",
    **TINY,
)
HYMBA = replace(PAPER, scale="vector", fusion="add", output="joint")
SHARED = replace(HYMBA, value="shared", norm="fused", scale="gate")
WIDTHS = {
    "one key head for three": replace(PAPER, num_attention_heads=3, qk_dim=36, value_dim=30, ssm_dim=24),
    "one group of states": replace(PAPER, ssm_groups=1),
    "one norm group": replace(PAPER, norm_groups=1),
    "two norm groups, joint": replace(HYMBA, norm_groups=2),
    "one norm group behind the fusion": replace(SHARED, norm_groups=1),
    "window": replace(PAPER, window=3),
    "window and sinks": replace(SHARED, window=2, sinks=2),
    "other head size than M": replace(PAPER, ssm_head_dim=8),
}


@pytest.mark.parametrize("length", [2, 5, 33])
@pytest.mark.parametrize("case", WIDTHS)
def test_widths_windows_and_groups(ranks, case, length):
    check_widths(WIDTHS[case])
    (ours,) = ranks(1).run(intra_layers, designs=[WIDTHS[case]], length=length)[0]
    wrong = {k: v for k, v in relative_errors(ours, formula(WIDTHS[case], ours)).items() if not v <= RTOL}
    assert not wrong


def test_positions_turn_the_narrow_queries(ranks):
    for design in (PAPER, SHARED, replace(HYMBA, branches=("attention", "attention"))):
        (ours,) = ranks(1).run(intra_layers, designs=[design], length=33, base=500)[0]
        assert max(relative_errors(ours, formula(design, ours, base=500)).values()) <= RTOL
        assert relative_errors(ours, formula(design, ours))["y"] > 1e-3


def test_the_formula_can_say_no(ranks):
    """Each axis is told apart by the output of the layer it belongs to."""
    (ours,) = ranks(1).run(intra_layers, designs=[replace(HYMBA, fusion="diff", norm="fused")], length=7)[0]
    for wrong in ({"fusion": "add"}, {"norm": "none"}, {"norm_groups": 1}, {"scale": "none"}, {"window": 2}):
        design = replace(HYMBA, **{"fusion": "diff", "norm": "fused", **wrong})
        assert relative_errors(ours, formula(design, ours, partial=True))["y"] > 1e-3, wrong


def test_flags_build_the_layer_with_its_norm_and_residual(ranks):
    """Off the command line: --intra-* flags, input norm, residual, and no other weights."""
    flags = "--position-embedding-type none --intra-preset hymba --intra-ssm-head-dim 4 --intra-window 5"
    ours = ranks(1).run(single.layer, symbol="P", flags=flags)[0]
    sizes = {"num_attention_heads": 4, "num_query_groups": 2, "qk_dim": 16, "value_dim": 32, "ssm_dim": 32}
    design = replace(HYMBA, **sizes, ssm_head_dim=4, ssm_groups=2, state_dim=8, window=5)
    x = torch.tensor(ours["x"], dtype=torch.float64)
    gain = torch.tensor(ours["weights"].pop("input_layernorm.weight"))
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    weights = {name.removeprefix("self_attention."): w for name, w in ours["weights"].items()}
    y = x + formula(design, {"x": normed, "dy": ours["dy"], "weights": weights, "depth": 0})["y"]
    assert float((y - torch.tensor(ours["y"])).abs().max() / y.abs().max()) <= RTOL


# Models that others wrote ------------------------------------------------------------------------


def test_falcon_h1_preset_is_the_layer_of_transformers(ranks):
    """`FalconH1DecoderLayer` with all of its multipliers at one: its two mixers and their sum."""
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer, FalconH1RotaryEmbedding

    design = replace(PAPER, norm="none", fusion="concat", output="joint", qk_dim=16, ssm_groups=1)
    (ours,) = ranks(1).run(intra_layers, designs=[design], length=31, base=10000)[0]
    config = FalconH1Config(
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_d_ssm=16,
        mamba_n_heads=4,
        mamba_d_head=4,
        mamba_n_groups=1,
        mamba_d_state=4,
        mamba_rms_norm=False,
        mamba_chunk_size=16,
        rope_theta=10000.0,
        attn_implementation="eager",
        pad_token_id=0,
    )
    theirs = FalconH1DecoderLayer(config, layer_idx=0).double()
    theirs.mamba.mup_vector = torch.ones((), dtype=torch.float64)  # their model sets it from its multipliers
    parts = _parts(design, ours)
    W_attention, W_mamba = torch.tensor(ours["weights"]["out_proj.weight"]).split([16, 16], 1)
    weights = {
        **{f"self_attn.{p}_proj.weight": parts[p] for p in "qkv"},
        "self_attn.o_proj.weight": W_attention,
        "mamba.in_proj.weight": torch.cat([parts[p] for p in ("z", "x", "B", "C", "dt")]),
        "mamba.out_proj.weight": W_mamba,
        "mamba.conv1d.weight": torch.tensor(ours["weights"]["mamba.conv1d_weight"]),
        "mamba.conv1d.bias": torch.tensor(ours["weights"]["mamba.conv1d_bias"]),
        **{f"mamba.{n}": torch.tensor(ours["weights"][f"mamba.{n}"]) for n in ("A_log", "D", "dt_bias")},
    }
    theirs.load_state_dict(weights, strict=False)
    x = torch.tensor(ours["x"]).transpose(0, 1)
    length = x.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    positions = FalconH1RotaryEmbedding(config)(x, torch.arange(length)[None])
    attended = theirs.self_attn(x, position_embeddings=positions, attention_mask=mask)[0]
    y = (attended + theirs.mamba(x)).transpose(0, 1).detach()
    assert float((y - torch.tensor(ours["y"])).abs().max() / y.abs().max()) <= RTOL


def test_diff_transformer_preset_is_the_published_formula(ranks):
    """Ye et al., arXiv:2410.05258, equations 1 to 3 and section 2.1, for one layer of given depth.

    head_i = (softmax(Q1 K1^T / sqrt(d)) - lambda softmax(Q2 K2^T / sqrt(d))) V, with V twice as wide as Q1;
    lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init, lambda_init = 0.8 - 0.6 exp(-0.3 (l - 1)) for layer l = 1, 2...
    output = Concat_i((1 - lambda_init) RMSNorm(head_i)) W_O.
    """
    axes = {"branches": ("attention", "attention"), "norm": "fused", "scale": "diff-lambda", "value": "shared"}
    design = replace(PAPER, **axes, output="joint", num_attention_heads=2, num_query_groups=2, qk_dim=8)
    for layer in (1, 3):
        (ours,) = ranks(1).run(intra_layers, designs=[design], length=9, depth=layer - 1)[0]
        w = {name: torch.tensor(t, dtype=torch.float64) for name, t in ours["weights"].items()}
        x = torch.tensor(ours["x"], dtype=torch.float64)[:, 0]
        parts = _parts(design, ours)
        q1, k1, q2, k2, v = (x @ parts[n].double().T for n in ("q1", "k1", "q2", "k2", "v"))
        a, b, c, e = w["fusion.lambdas"].chunk(4)
        start = 0.8 - 0.6 * np.exp(-0.3 * (layer - 1))
        lam = torch.exp((a * b).sum()) - torch.exp((c * e).sum()) + start
        mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
        heads = []
        for i in range(2):
            narrow, wide = slice(4 * i, 4 * i + 4), slice(8 * i, 8 * i + 8)
            first = torch.softmax(q1[:, narrow] @ k1[:, narrow].T / 2 + mask, -1)
            second = torch.softmax(q2[:, narrow] @ k2[:, narrow].T / 2 + mask, -1)
            head = (first - lam * second) @ v[:, wide]
            norm = head / (head.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            heads.append((1 - start) * norm * w["fusion.fused_norm.weight"][wide])
        y = torch.cat(heads, -1) @ w["out_proj.weight"].T
        assert float((y - torch.tensor(ours["y"])[:, 0]).abs().max() / y.abs().max()) <= RTOL


def _parts(design: IntraDesign, ours: dict) -> dict[str, Tensor]:
    """Rows of the input projection by name."""
    rows = [part.rows for part in design.in_parts]
    weight = torch.tensor(ours["weights"]["in_proj.weight"])
    return dict(zip([part.name for part in design.in_parts], weight.split(rows), strict=True))
