"""Presets, rules and widths of P layers."""

from types import SimpleNamespace

import pytest

from megatron_hybrid.accounting.projection import Part
from megatron_hybrid.layers.intra.branch_inputs import BranchInputs
from megatron_hybrid.layers.intra.design import AXES, PRESETS, design


def flags_of(**flags):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "group_query_attention": True}
    mamba = {"mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_state_dim": 16}
    return SimpleNamespace(**{**sizes, **mamba, **flags})


def of(**flags):
    return design(flags_of(**flags))


def test_a_preset_sets_every_axis_and_a_flag_one():
    for name, axes in PRESETS.items():
        made = of(intra_preset=name)
        assert {axis: getattr(made, axis) for axis in AXES[1:]} == {axis: axes[axis] for axis in AXES[1:]}
        assert ",".join(made.branches) == axes["branches"]
    changed = of(intra_preset="hymba", intra_scale="none")
    assert (changed.scale, changed.norm, changed.output) == ("none", "group", "joint")


def test_default_widths_are_the_papers_shares_of_the_model():
    made = of()
    assert (made.num_attention_heads, made.num_query_groups) == (4, 2)
    assert (made.qk_dim, made.value_dim, made.ssm_dim) == (32, 64, 64)
    assert (made.qk_head_dim, made.value_head_dim, made.ssm_heads) == (8, 16, 8)


def parts(made):
    return {part.name: part.rows for part in made.in_parts}


def test_input_parts_of_the_papers_design():
    assert parts(of()) == {"q": 32, "k": 16, "v": 32, "z": 64, "x": 64, "B": 32, "C": 32, "dt": 8}
    assert of().out_parts == {"attention": 64, "mamba": 64}


def test_branches_that_are_alike_are_numbered_and_share_one_value():
    shared = of(intra_preset="diff-transformer")
    assert parts(shared) == {"q1": 32, "k1": 16, "v": 32, "q2": 32, "k2": 16}
    assert shared.branch_parts(1) == ["q2", "k2", "v"]
    assert shared.out_parts == {"fused": 64}
    two = of(intra_preset="diff-mamba", intra_value="shared")
    assert [n for n in parts(two) if n.startswith("x")] == ["x"]
    assert two.branch_parts(1) == ["z2", "x", "B2", "C2", "dt2"]
    assert list(two.out_parts) == ["mamba1", "mamba2"]


def test_a_value_shared_with_mamba_is_its_x_of_which_each_query_head_has_its_own_part():
    made = of(intra_value="shared", intra_ssm_dim=96)
    assert "v" not in parts(made) and parts(made)["x"] == 96
    assert made.branch_parts(0) == ["q", "k", "x"]
    assert (made.value_dim, made.value_heads, made.value_head_dim) == (96, 4, 24)


def test_gates_are_rows_that_all_ranks_share():
    assert parts(of(intra_scale="gate"))["gate"] == 2
    assert parts(of(intra_scale="interpolate", intra_fusion="add"))["gate"] == 1


@pytest.mark.parametrize(
    ("part", "tp", "shared", "local", "starts"),
    [
        (Part("q", 8, 4), 2, False, 16, [0, 16]),
        (Part("k", 2, 4), 4, True, 4, [0, 0, 4, 4]),
        (Part("B", 1, 16), 4, True, 16, [0, 0, 0, 0]),
        (Part("gate", 1, 2), 1, False, 2, [0]),
    ],
)
def test_ranks_take_whole_units_or_share_one(part, tp, shared, local, starts):
    assert (part.is_shared(tp), part.local_rows(tp)) == (shared, local)
    assert [part.start(tp, rank) for rank in range(tp)] == starts


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"intra_preset": "jamba"}, ["jamba", "falcon-h1"]),
        ({"intra_branches": "mamba,attention"}, ["mamba,attention", "attention,mamba"]),
        ({"intra_fusion": "concat"}, ["--intra-output separate", "--intra-fusion add"]),
        ({"intra_norm": "fused"}, ["--intra-output joint", "before the fusion"]),
        ({"intra_scale": "interpolate"}, ["interpolate", "diff", "--intra-fusion add"]),
        (
            {"intra_norm": "fused", "intra_fusion": "concat", "intra_output": "joint", "intra_scale": "gate"},
            ["takes a common factor", "--intra-norm group"],
        ),
        ({"intra_output": "joint", "intra_ssm_dim": 48}, ["equally wide", "64", "48"]),
        ({"intra_value": "shared", "intra_value_dim": 32}, ["--intra-value-dim 32", "--intra-ssm-dim 64"]),
        ({"intra_preset": "diff-mamba", "intra_window": 4}, ["attention branch"]),
        ({"intra_sinks": 4}, ["--intra-sinks 4", "without --intra-window"]),
        ({"intra_window": 0}, ["--intra-window 0", "at least itself"]),
        ({"intra_qk_dim": 30}, ["--intra-qk-dim is 30", "--intra-num-attention-heads, which is 4"]),
        ({"intra_ssm_head_dim": 12}, ["--intra-ssm-dim is 64", "which is 12"]),
        ({"intra_norm": "none", "intra_norm_groups": 2}, ["there is no norm"]),
        ({"intra_norm_groups": 5}, ["attention branch is 64", "--intra-norm-groups, which is 5"]),
        ({"mamba_num_groups": 3}, ["heads of --intra-ssm-dim is 8", "--mamba-num-groups, which is 3"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(flags, words):
    with pytest.raises(ValueError) as error:
        of(**flags)
    for word in words:
        assert word in str(error.value)


def test_parts_are_read_in_few_pieces():
    from megatron_hybrid.layers.intra.branch_inputs import read_together

    def pieces(**flags):
        made = of(**flags)
        return read_together([p.name for p in made.in_parts], [made.branch_parts(0), made.branch_parts(1)])

    assert pieces() == [("q", "k", "v"), ("z", "x", "B", "C", "dt")]
    assert pieces(intra_scale="gate")[-1] == ("gate",)
    assert pieces(intra_value="shared") == [("q", "k"), ("z",), ("x",), ("B", "C", "dt")]
    assert pieces(intra_preset="diff-transformer") == [("q1", "k1"), ("v",), ("q2", "k2")]
    two = pieces(intra_preset="diff-mamba", intra_value="shared")
    assert two == [("z1",), ("x",), ("B1", "C1", "dt1"), ("z2",), ("B2", "C2", "dt2")]


def test_branch_inputs_are_views_in_the_order_of_each_core():
    """Pure: no Megatron. Attention reads x, which lies between z and B, as its value."""
    import torch

    inputs = BranchInputs({"q": 2, "k": 1, "z": 3, "x": 4, "B": 1, "gate": 2}, [["q", "k", "x"], ["z", "x", "B"]])
    projected = torch.arange(13.0).expand(1, 1, 13)
    (attention, mamba), gate = inputs.split(projected)
    assert torch.cat(attention, -1).flatten().tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert torch.cat(mamba, -1).flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert gate is not None and gate.flatten().tolist() == [11, 12]
    assert attention[0].data_ptr() == projected.data_ptr()
    _, nothing = BranchInputs({"q": 2, "z": 3}, [["q"], ["z"]]).split(torch.zeros(1, 1, 5))
    assert nothing is None


@pytest.mark.parametrize(("axis", "value"), [("fusion", "multiply"), ("scale", "matrix"), ("norm", "batch")])
def test_an_unknown_choice_is_no_other_one(axis, value):
    from megatron_hybrid.layers.intra import fusion

    tables = {"fusion": fusion.FUSIONS, "scale": fusion.SCALES, "norm": fusion.NORMS}
    with pytest.raises(ValueError, match=f"--intra-{axis} {value}: choose one of"):
        fusion.entry(tables[axis], axis, value)
