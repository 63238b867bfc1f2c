"""Counted activation memory against the bytes that autograd keeps of the real layers (CPU, torch backend).

Tolerance: the tables leave out vectors of the size of parameters (A and D of the scan, scales of the fusion) and one
of the gated delta rule's chunks, whose first state needs no gradient: below 0.5% at these sizes. A missing tensor shows
as 1.5% or more, since the smallest line that grows with tokens times a width is that part of its layer.
"""

import pytest

from tests.costs import measure_activations

SHORT = "--micro-batch-size 2 --seq-length 332"  # no multiple of the scan's chunk of 128, or the delta rule's of 64
LONG = "--micro-batch-size 1 --seq-length 636"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-method"
TP2, SP, CP2 = "--tensor-model-parallel-size 2", "--sequence-parallel", "--context-parallel-size 2"


def agree(found, symbols):
    """Of each layer: the rank that holds most; of experts the mean, since routing decides on each rank's share."""
    wrong = {}
    for symbol, *ranks in zip(symbols, *found, strict=True):
        kept = [bytes_kept for bytes_kept, _ in ranks]
        measured, counted = sum(kept) / len(kept) if symbol == "E" else max(kept), ranks[0][1]
        if abs(counted / measured - 1) > 0.005:
            wrong[symbol] = f"measured {measured}, counted {counted}"
    assert not wrong


@pytest.mark.parametrize(
    ("size", "pattern", "flags"),
    [
        (1, "*WMPEG-", SHORT),
        (1, "*WMPE-", LONG),  # twice as long: what grows with the square shows
        (1, "*WMPEG-", f"{LONG} --bf16"),
        (1, "*-MP", f"{SHORT} --hidden-dropout 0.1 --position-embedding-type none"),
        (1, "*WP-E", f"{SHORT} --rotary-percent 0.5 --squared-relu --moe-shared-expert-gate"),
        (1, "*WMPE-", f"{SHORT} {SELECTIVE} core_attn mlp moe --hybrid-recompute ssm"),
        (1, "PE", f"{SHORT} {SELECTIVE} shared_experts --hybrid-recompute intra"),
        (2, "*WMPEG-", f"{SHORT} {TP2} {SP}"),
        (2, "*WMP-", f"{SHORT} {TP2} --bf16 --mamba-num-groups 1 --num-query-groups 1"),  # shared B, C and keys
        (2, "*WMPEG-", f"{SHORT} {CP2}"),
        (2, "*WP", f"{SHORT} {CP2} {SELECTIVE} core_attn"),
        (2, "E", f"{SHORT} --expert-model-parallel-size 2 --moe-shared-expert-gate"),
        (2, "E", f"{SHORT} {TP2} {SP} --expert-tensor-parallel-size 1 --moe-shared-expert-gate --bf16"),
    ],
)
def test_layers(ranks, size, pattern, flags):
    agree(ranks(size).run(measure_activations.layers, pattern=pattern, flags=flags), pattern)


EQUAL_HEADS = "--intra-qk-dim 256"  # values as wide as queries: attention pads nothing, and keeps views


@pytest.mark.parametrize(
    "flags",
    [
        "--intra-preset hymba",
        "--intra-preset falcon-h1 --bf16",
        "--intra-preset diff-transformer",
        f"--intra-preset diff-transformer {EQUAL_HEADS}",
        "--intra-preset diff-mamba",
        f"{EQUAL_HEADS} --intra-window 64 --intra-sinks 4",
        f"{EQUAL_HEADS} --bf16",
        "--intra-scale gate",
        f"--intra-value shared {EQUAL_HEADS}",
        "--intra-value shared --hybrid-recompute ssm",
    ],
)
def test_designs_of_the_intra_layer_hybrid(ranks, flags):
    agree(ranks(1).run(measure_activations.layers, pattern="P", flags=f"{SHORT} {flags}"), "P")


ALL = "*WMP-EG"


@pytest.mark.parametrize(
    ("size", "pattern", "flags"),
    [
        (1, ALL, ""),
        (1, ALL[:-1], f"--bf16 {SELECTIVE} mlp"),
        (1, "*-MP/W-", "--untie-embeddings-and-output-weights"),
        (1, ALL, f"{FULL} uniform --recompute-num-layers 2"),
        (1, ALL, f"{FULL} block --recompute-num-layers 3"),
        (1, "*-MP/W-", f"{FULL} uniform --recompute-num-layers 1"),
        (2, ALL[:-1], f"{TP2} {SP}"),
        (2, "*WMP-", f"{TP2} {FULL} uniform --recompute-num-layers 2 --distribute-saved-activations"),
    ],
)
def test_whole_models(ranks, size, pattern, flags):
    found = ranks(size).run(measure_activations.model, pattern=pattern, flags=f"{SHORT} {flags}")
    measured, counted = max(kept for kept, _ in found), found[0][1]
    assert counted == pytest.approx(measured, rel=0.005)
