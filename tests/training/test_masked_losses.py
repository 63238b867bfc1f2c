"""Losses under a mask that leaves ranks different numbers of tokens: each mean is that of one process."""

import numpy as np
import pytest

from tests.model.test_layouts import CP2, DP, EP2, PP2, RTOL, SP, TP2, _at
from tests.support.training import losses

MASK = "--eod-mask-loss"
PER_TOKEN = "--calculate-per-token-loss"
AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01"
DENSE, HEADS, EXPERTS = "M-P-", "M-*-/*-/*-", "ME*E"
MTP = "--mtp-num-layers 2"

# Pattern, its flags, processes, the pattern with stages, flags of the layout
CASES = {
    "cp2": (DENSE, MASK, 2, DENSE, CP2),
    "dp2": (DENSE, MASK, 2, DENSE, DP),
    "cp2-packed": (DENSE, f"{MASK} --reset-attention-mask", 2, DENSE, CP2),
    "cp2-per-token": (DENSE, f"{MASK} {PER_TOKEN}", 2, DENSE, CP2),
    "pp2-cp2": (DENSE, MASK, 4, _at(DENSE, 2), f"{PP2} {CP2}"),
    "heads-cp2": (HEADS, f"{MASK} {MTP}", 2, HEADS, CP2),
    "heads-cp2-without-a-mask": (HEADS, MTP, 2, HEADS, CP2),
    "heads-cp2-per-token": (HEADS, f"{MASK} {MTP} {PER_TOKEN}", 2, HEADS, CP2),
    "heads-cp2-packed": (HEADS, f"{MASK} {MTP} --reset-attention-mask", 2, HEADS, CP2),
    "experts-cp2-tp2": (EXPERTS, f"{MASK} {AUX}", 4, EXPERTS, f"{CP2} {TP2} {SP}"),
    "experts-ep2-per-token": (EXPERTS, f"{MASK} {PER_TOKEN}", 2, EXPERTS, f"{EP2} {DP}"),
}


@pytest.mark.parametrize("case", CASES)
def test_masked_losses_equal_one_process(ranks, reference, case):
    pattern, own, size, staged, layout = CASES[case]
    where, expected = reference(pattern, own)
    for found in ranks(size).run(losses, pattern=staged, load=where, flags=f"{own} {layout}"):
        assert np.allclose(found, expected, rtol=RTOL, atol=0), (found, expected)


def test_a_loss_of_every_token_alike_depends_on_no_micro_batch(ranks, reference):
    """With --calculate-per-token-loss; without it each micro-batch counts alike, as in Megatron."""
    where, expected = reference(DENSE, f"{MASK} {PER_TOKEN}")
    for flags, same in ((f"{MASK} {PER_TOKEN}", True), (MASK, False)):
        found = ranks(1).run(losses, pattern=DENSE, load=where, flags=f"{flags} --micro-batch-size 2")[0]
        assert np.allclose(found, expected, rtol=RTOL, atol=0) == same
