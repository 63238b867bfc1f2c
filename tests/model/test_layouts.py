"""Every parallel layout against one process, from the same weights."""

import pytest

from tests.support.training import losses

TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
DP = "--use-distributed-optimizer"

# fp32 sums in another order: 1e-5 relative leaves a factor of about 30 to what is seen after three steps
RTOL = 1e-5

PATTERNS = ["M-*-", "W-P-", "MEPE", "M-M-P-M-M-", "G-M-"]


def _at(pattern: str, *positions: int) -> str:
    """The pattern with stage boundaries in front of these layers."""
    return "".join(("|" if i in positions else "") + symbol for i, symbol in enumerate(pattern))


def _layouts(pattern: str) -> list[tuple[str, int, str, str]]:
    """Name, processes, pattern with boundaries, flags."""
    half = _at(pattern, len(pattern) // 2)
    quarters = _at(pattern, *(len(pattern) * i // 4 for i in (1, 2, 3)))
    rows = [
        ("micro-batch-2", 1, pattern, f"--micro-batch-size 2 {DP}"),
        ("dp2", 2, pattern, DP),
        ("pp2", 2, half, f"{PP2} {DP}"),
        ("cp2", 2, pattern, f"{CP2} {DP}"),
        ("tp2-sp", 2, pattern, f"{TP2} {SP} {DP}"),
    ]
    if "G" in pattern:  # upstream's layer: that it is built and wired right is all there is to show
        return rows
    rows += [
        ("pp2-vpp2", 2, quarters, f"{PP2} {DP}"),
        ("tp2-sp-pp2", 4, half, f"{TP2} {SP} {PP2} {DP}"),
    ]
    if "E" in pattern:
        rows += [
            ("ep2", 2, pattern, f"{EP2} {DP}"),
            ("ep2-tp2-sp", 4, pattern, f"{EP2} {TP2} {SP} --expert-tensor-parallel-size 2 {DP}"),
            ("ep2-etp1-tp2-sp", 4, pattern, f"{EP2} {TP2} {SP} --expert-tensor-parallel-size 1 {DP}"),
            ("ep2-pp2", 4, half, f"{EP2} {PP2} {DP}"),
        ]
    else:
        rows += [("tp2", 2, pattern, f"{TP2} {DP}"), ("tp2-pp2", 4, half, f"{TP2} {PP2} {DP}")]
    if "P" in pattern:
        rows += [
            ("tp2-sp-cp2", 4, pattern, f"{TP2} {SP} {CP2} {DP}"),
            ("tp2-sp-dp2", 4, pattern, f"{TP2} {SP} {DP}"),
            ("pp2-cp2", 4, half, f"{PP2} {CP2} {DP}"),
        ]
    return rows


CASES = [(pattern, *row) for pattern in PATTERNS for row in _layouts(pattern)]


@pytest.mark.parametrize(("pattern", "name", "size", "staged", "flags"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_layout_equals_one_process(ranks, reference, pattern, name, size, staged, flags):
    where, expected = reference(pattern)
    for rank, found in enumerate(ranks(size).run(losses, pattern=staged, load=where, flags=flags)):
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=RTOL), f"{name}, rank {rank}, step {step}"
