"""Heads of attention by our kernel, in Triton's interpreter, against upstream's operations; which options it serves."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hybrid.layers.attention.rotated_heads import not_served
from tests.model.test_layouts import CP2, DP, RTOL, SP, TP2
from tests.support import rotated_runs
from tests.support.training import folder, initial_checkpoint

interpreted = pytest.mark.triton_interpreter
GROUPED, ONE = (2, 2, 1, 1, 8, 8), (1, 4, 2, 2, 4, 8)
"""Heads of * and W in training.py's sizes, and of P: groups, heads of each kind in one, head sizes."""


@interpreted
@pytest.mark.parametrize(
    ("symbol", "flags", "went"),
    [
        ("*", "", (GROUPED, True)),
        ("*", "--rotary-percent 0.5", (GROUPED, True)),
        ("*", "--rotary-interleaved", (GROUPED, True)),
        ("*", "--position-embedding-type none", (GROUPED, False)),
        ("W", "", (GROUPED, True)),
        ("P", "", (ONE, True)),
        ("P", "--rotary-percent 0.5 --rotary-interleaved", (ONE, True)),
        ("P", "--intra-value shared", ((1, 4, 2, 4, 4, 8), True)),
        ("P", "--intra-preset diff-transformer", (ONE, True)),
        ("P", "--position-embedding-type none", None),
    ],
)
def test_a_layer_is_upstreams(ranks, symbol, flags, went):
    (ours, seen), (theirs, none) = (
        ranks(1).run(rotated_runs.layer, ours=way, symbol=symbol, flags=flags, length=21)[0] for way in (True, False)
    )
    assert none == [] and set(seen) == ({went} if went else set())
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-5, atol=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, found in ours["gradients"].items():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(theirs["gradients"][name]), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        (CP2, True),
        (f"{TP2} {SP}", True),
        (f"{DP} --reset-attention-mask --bf16", True),
        (f"{DP} --recompute-granularity selective --recompute-modules core_attn --hybrid-recompute intra", True),
        (f"{TP2} --num-query-groups 1", False),
    ],
    ids=["cp2", "tp2", "packed-bf16", "recompute", "fewer-keys-than-ranks"],
)
def test_layouts_train_as_upstreams_way(ranks, tmp_path, flags, shares):
    where = folder(tmp_path)
    common = "--num-query-groups 1" if not shares else ""
    pattern = "*WP-" if shares else "*-"
    ranks(1).run(initial_checkpoint, pattern=pattern, folder=where, **({"flags": common} if common else {}))
    case = {"pattern": pattern, "load": where, "flags": flags}
    for (found, went), (wanted, none) in zip(
        ranks(2).run(rotated_runs.losses, ours=True, **case),
        ranks(2).run(rotated_runs.losses, ours=False, **case),
        strict=True,
    ):
        assert bool(went) is shares and none == []
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-2 if "bf16" in flags else RTOL)


SHORT = "--micro-batch-size 2 --seq-length 332 --bf16"
TOKENS = 2 * 332


@interpreted
def test_what_a_layer_keeps(ranks):
    """8 query and 2 key heads of 32: v rather than the projection, and a table in place of cosines and sines."""
    ours, theirs = (ranks(1).run(rotated_runs.kept, ours=way, pattern="*", flags=SHORT)[0] for way in (True, False))
    table, cos_sin = 332 * 32 * 4, 4 * 332 * 32 * 2
    assert theirs - ours == TOKENS * 2 * (12 * 32 - 2 * 32) + cos_sin - table


def built(**options):
    config = {
        "attention_output_gate": False,
        "num_query_groups": 2,
        "no_rope_freq": None,
        "fused_single_qkv_rope": False,
        "fine_grained_activation_offloading": False,
        "test_mode": False,
    }
    layer = {"q_layernorm": None, "k_layernorm": None, "world_size": 2}
    layer |= {name: value for name, value in options.items() if name in layer}
    config |= {name: value for name, value in options.items() if name in config}
    return SimpleNamespace(**layer, config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    "options",
    [
        {"q_layernorm": torch.nn.Identity()},
        {"k_layernorm": torch.nn.Identity()},
        {"attention_output_gate": True},
        {"num_query_groups": 1},
        {"no_rope_freq": [0, 1]},
        {"fused_single_qkv_rope": True},
        {"fine_grained_activation_offloading": True},
        {"test_mode": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_need_upstreams_way(options):
    assert len(not_served(built(**options))) == 1
    assert not_served(built()) == []
