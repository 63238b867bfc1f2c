"""Saving in one layout and loading in another, and resuming without a trace."""

from typing import Any

import pytest
import torch

from tests.model.test_layouts import DP, EP2, PP2, SP, TP2
from tests.support.training import continued, folder, resumed, trained

# One layer of each kind: fused weights that reshard by their parts, experts, norms, biases of the router
PATTERN = "MEP-*-WE"

LAYOUTS = {
    "tp2-sp": (2, PATTERN, f"{TP2} {SP}"),
    "pp2": (2, "MEP-|*-WE", PP2),
    "ep2": (2, PATTERN, EP2),
    "dp2": (2, PATTERN, ""),
    "tp2-sp-pp2": (4, "MEP-|*-WE", f"{TP2} {SP} {PP2}"),
    "ep2-tp2-sp": (4, PATTERN, f"{EP2} {TP2} {SP}"),
}


def same(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names whose values are not equal bit for bit."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if not (torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value)
    ]


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory):
    """Folder of a checkpoint after two steps on one process, and that run's state there and two steps on."""
    where = folder(tmp_path_factory.mktemp("one"))
    return where, ranks(1).run(trained, pattern=PATTERN, flags=DP, save=where, before=2, after=2)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_of_one_process_continues_in_another_layout_and_comes_back(ranks, one_process, tmp_path, layout):
    where, expected = one_process
    size, pattern, flags = LAYOUTS[layout]
    there = folder(tmp_path / "there")
    for result in ranks(size).run(continued, pattern=pattern, flags=f"{DP} {flags}", load=where, save=there):
        # the next losses and norms, as in test_parity: the same sums in another order
        for found, wanted in zip(result["steps"], expected["steps"][2:], strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
    # Saved again by that layout without a step and loaded by one process: nothing may have changed by a bit
    back = ranks(1).run(continued, pattern=PATTERN, flags=DP, load=there, steps=2)[0]
    assert same(back["parameters"], expected["parameters"]) == []
    assert same(back["optimizer"], expected["optimizer"]) == []
    assert back["steps"] == expected["steps"][2:]


@pytest.mark.parametrize("layout", ["dp2", "tp2-sp", "pp2", "ep2"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(ranks, tmp_path, layout):
    _, pattern, flags = LAYOUTS[layout]
    # dropout makes the random state part of what must come back
    flags += f" {DP} --hidden-dropout 0.1 --attention-dropout 0.1"
    flags += " --lr-decay-style linear --lr-decay-iters 10 --lr-warmup-iters 2"
    where = folder(tmp_path / "half")
    straight = ranks(2).run(trained, pattern=pattern, flags=flags, save=where, before=5, after=5)
    again = ranks(2).run(resumed, pattern=pattern, flags=flags, load=where, steps=5)
    for rank in range(2):
        assert again[rank]["steps"] == straight[rank]["steps"][5:]
        assert same(again[rank]["end_parameters"], straight[rank]["end_parameters"]) == []
        assert same(again[rank]["end_optimizer"], straight[rank]["end_optimizer"]) == []
    assert straight[0]["steps"][0] != straight[0]["steps"][1]
