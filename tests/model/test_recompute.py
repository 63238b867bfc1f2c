"""Activation recomputation changes nothing but memory."""

import pytest

from tests.model.test_layouts import DP, SP, TP2
from tests.support.training import folder, initial_checkpoint, losses

PATTERN = "M-P-*EW-"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    where = folder(tmp_path_factory.mktemp("recompute"))
    ranks(1).run(initial_checkpoint, pattern=PATTERN, folder=where)
    return where, ranks(2).run(losses, pattern=PATTERN, load=where, flags=f"{DP} {TP2} {SP}")[0]


@pytest.mark.parametrize(
    "flags",
    [
        f"{FULL} 1",
        f"{FULL} 3",
        "--recompute-granularity selective --recompute-modules core_attn",
        "--hybrid-recompute ssm",
        "--hybrid-recompute intra",
        "--hybrid-recompute ssm intra --recompute-granularity selective --recompute-modules core_attn moe mlp",
    ],
)
def test_recomputed_equals_kept(ranks, plain, flags):
    where, expected = plain
    found = ranks(2).run(losses, pattern=PATTERN, load=where, flags=f"{DP} {TP2} {SP} {flags}")[0]
    assert found == expected  # the same operations on the same numbers: equal to the bit
