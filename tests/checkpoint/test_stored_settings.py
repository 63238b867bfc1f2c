"""What a run's flags say against what a checkpoint was trained with: refused by name, allowed, or noted."""

from argparse import Namespace

import pytest

from megatron_hybrid.checkpoint.stored_settings import SHAPES, check_model, computed_by
from tests.layers.test_intra_design import flags_of

PLAIN = dict.fromkeys([*SHAPES.split(), *computed_by()])


def args(pattern: str = "M-*-", allow: tuple[str, ...] = (), **settings) -> Namespace:
    return Namespace(**{**PLAIN, **settings}, hybrid_layer_pattern=pattern, allow_changed=list(allow))


@pytest.mark.parametrize(
    ("pattern", "name", "was", "now"),
    [
        ("M-*-", "squared_relu", True, False),
        ("M-*-", "untie_embeddings_and_output_weights", True, False),
        ("M-*-", "rotary_base", 50000, 10000),
        ("M-*-", "layernorm_epsilon", 1e-6, 1e-5),
        ("W-", "swa_window", 512, 128),
        ("ME", "moe_router_score_function", "sigmoid", "softmax"),
        ("G-", "linear_conv_kernel_dim", 4, 2),
    ],
)
def test_a_setting_that_changes_no_shape_is_refused_by_name(pattern, name, was, now):
    with pytest.raises(ValueError, match=rf"{name} is {was} in it and {now} here.*run.json") as error:
        check_model(args(pattern, **{name: was}), args(pattern, **{name: now}), "runs/a")
    may_be_allowed = name not in SHAPES
    assert (f"--allow-changed {name}" in str(error.value)) == may_be_allowed
    assert check_model(args(pattern, **{name: was}), args(pattern, **{name: was}), "runs/a") == []
    if may_be_allowed:
        flag = f"--{name.replace('_', '-')}"
        notes = check_model(args(pattern, **{name: was}), args(pattern, (flag,), **{name: now}), "runs/a")
        assert notes == [f"{name} is {now}, and {was} in the checkpoint (--allow-changed)"]


def test_only_settings_of_layers_that_are_there_count():
    assert check_model(args("M-", swa_window=1, rotary_base=1), args("M-", swa_window=2, rotary_base=2), "") == []


def test_what_an_older_checkpoint_lacks_is_not_compared():
    stored = args("M-*-", squared_relu=True)
    del stored.rotary_base
    assert check_model(stored, args("M-*-", squared_relu=True, rotary_base=3), "") == []


def test_a_shape_cannot_be_allowed_to_change():
    with pytest.raises(ValueError, match="--allow-changed hidden_size: it takes settings that change .*swa_window"):
        check_model(args(), args(allow=("hidden-size",)), "")


def test_a_checkpoint_of_another_design_is_refused_by_name():
    """These two have the same weights, key by key and shape by shape."""

    def designed(**flags) -> Namespace:
        return args("P-", **vars(flags_of(intra_preset="hymba", **flags)))

    saved = designed()
    saved.intra_overlap = False  # of checkpoints of 0.1.0
    assert check_model(saved, designed(), "runs/a") == []
    with pytest.raises(ValueError, match="runs/a .*intra_fusion is add in it and diff here"):
        check_model(saved, designed(intra_fusion="diff"), "runs/a")
    with pytest.raises(ValueError, match="intra_window is None in it and 9 here"):
        check_model(saved, designed(intra_window=9), "runs/a")
