"""Every point of the intra-layer design space against its formula, and against models that others wrote.

Everything runs in fp64, but for A, dt_bias and lambda, which the layer rounds to fp32 and whose gradients come back
through fp32: 6e-8. Where a norm takes the size of a branch away, gradients are small differences of large terms, which
costs up to two digits. A wrong sign, factor, order or place of a norm shows at 1e-3 and more
(`test_the_formula_can_say_no`).
"""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hybrid.layers.intra.design import AXES, IntraDesign, check_axes, check_widths
from tests.layers.intra_formula import formula, relative_errors
from tests.support import single

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
    for design, ours in zip(designs, ranks(1).run(single.intra_layers, designs=designs, length=7)[0], strict=True):
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
    (ours,) = ranks(1).run(single.intra_layers, designs=[WIDTHS[case]], length=length)[0]
    wrong = {k: v for k, v in relative_errors(ours, formula(WIDTHS[case], ours)).items() if not v <= RTOL}
    assert not wrong


def test_positions_turn_the_narrow_queries(ranks):
    for design in (PAPER, SHARED, replace(HYMBA, branches=("attention", "attention"))):
        (ours,) = ranks(1).run(single.intra_layers, designs=[design], length=33, base=500)[0]
        assert max(relative_errors(ours, formula(design, ours, base=500)).values()) <= RTOL
        assert relative_errors(ours, formula(design, ours))["y"] > 1e-3


def test_the_formula_can_say_no(ranks):
    """Each axis is told apart by the output of the layer it belongs to."""
    (ours,) = ranks(1).run(single.intra_layers, designs=[replace(HYMBA, fusion="diff", norm="fused")], length=7)[0]
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
    (ours,) = ranks(1).run(single.intra_layers, designs=[design], length=31, base=10000)[0]
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
        (ours,) = ranks(1).run(single.intra_layers, designs=[design], length=9, depth=layer - 1)[0]
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
