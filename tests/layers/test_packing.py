"""Packed documents under --reset-attention-mask: each is treated as if it stood alone, in every layout."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_layouts import CP2, DP, PP2, RTOL, SP, TP2, _at
from tests.support.training import EOD, Run, folder, initial_checkpoint, losses

# What the ranks run ---------------------------------------------------------------------------------


def logits(pattern: str, flags: str, samples: list[tuple[list[int], list[int]]]) -> list[dict[str, list]]:
    """One model on samples of any lengths, on one rank.

    Args:
        samples: Tokens and labels.

    Returns:
        For each sample ``losses`` [s], ``logits`` [heads, s, vocabulary] (the model's, then those of its prediction
        heads), and ``gradient`` [s, h], the sum of losses by the embedded tokens.
    """
    from megatron.core.utils import unwrap_model

    run = Run(pattern, f"--no-save-optim {flags}")
    model = unwrap_model(run.model[0]).train()
    results = []
    for tokens, labels in samples:
        heads: list[Any] = []  # copies: upstream's loss works in place
        embedded: list[Any] = []
        hooks = [
            model.output_layer.register_forward_hook(lambda _m, _i, out, heads=heads: heads.append(out[0].clone())),
            model.embedding.register_forward_hook(lambda _m, _i, out, to=embedded: to.append(out)),
        ]
        length = len(tokens)
        sample = {
            "tokens": torch.tensor([tokens]),
            "labels": torch.tensor([labels]),
            "loss_mask": torch.ones(1, length),
            "position_ids": torch.arange(length)[None],
        }
        losses, _ = run.forward_step(iter([sample]), run.model[0])
        for hook in hooks:
            hook.remove()
        embedded[0].retain_grad()
        losses.sum().backward()
        ordered = [heads[-1], *heads[:-1]]  # upstream computes the prediction heads' first
        found = {"losses": losses[0], "logits": torch.stack([h[:, 0] for h in ordered])}
        found["gradient"] = embedded[0].grad[:, 0]
        results.append({name: value.tolist() for name, value in found.items()})
    return results


def look_ahead(tokens: list[list[int]], documents: list[list[int]]) -> tuple[list[list[int]], int]:
    """This context-parallel rank's tokens of two, each replaced by the next of its document; and their sum."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    group = torch.distributed.group.WORLD
    chunks = torch.tensor(tokens).chunk(4, 1)
    own = torch.cat([chunks[group.rank()], chunks[3 - group.rank()]], 1)
    packed = PackedSeqParams(qkv_format="sbhd", seq_idx=torch.tensor(documents, dtype=torch.int32))
    shifted, total = roll_tensor(own, cp_group=group, packed_seq_params=packed)
    return shifted.tolist(), int(total)


# Tests ----------------------------------------------------------------------------------------------

PACKED = "--reset-attention-mask --reset-position-ids"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# the paper's vocabulary of layers: NoPE, RoPE, windows whose sinks are those of the document, and prediction heads
ALONE = {
    "M-*-": "",
    "*-M- without RoPE": "--position-embedding-type none",
    "W-P-": "",
    "M-P-/W-P-": "--mtp-num-layers 1",
    "M-*-/*-/*-": "--mtp-num-layers 2 --hybrid-recompute ssm",
}
LENGTHS = [13, 1, 18]
"""Shorter and longer than the window of 9 and its 3 sinks; not multiples of anything."""


def _documents(seed: int = 5) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(EOD) for _ in range(length - 1)] + [EOD] for length in LENGTHS]


@pytest.fixture(scope="module", params=ALONE, ids=str)
def runs(request, ranks):
    """Packed documents; the same with another first token; and each document on its own."""
    documents = _documents()
    packed = [t for document in documents for t in document]
    labels = packed[1:] + [0]
    starts = np.cumsum([0, *LENGTHS])
    samples = [(packed, labels), ([(packed[0] + 1) % EOD, *packed[1:]], labels)]
    samples += [(packed[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    flags = f"{PACKED} {ALONE[request.param]}"
    found = ranks(1).run(logits, pattern=request.param.split()[0], flags=flags, samples=samples)[0]
    return [{name: np.array(value) for name, value in sample.items()} for sample in found]


def test_a_packed_document_is_computed_as_if_alone(runs):
    packed, _, *alone = runs
    names = {"losses": 0, "logits": 1, "gradient": 0}
    if packed["logits"].shape[0] > 1:
        del names["gradient"]  # the loss of prediction heads is averaged over the sample
    for name, axis in names.items():
        expected = np.concatenate([d[name] for d in alone], axis)
        # fp32, with sums of other lengths; what leaks from another document shows at 1e-3 and more
        assert np.abs(packed[name] - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_a_token_changes_nothing_in_later_documents(runs):
    packed, changed, *_ = runs
    moved = np.abs(packed["logits"] - changed["logits"]).max((0, 2))
    # the scan takes decays from one running sum of the sample, whose last bits a document before can change
    assert (moved[LENGTHS[0] :] <= 2e-6).all()
    assert (moved[: LENGTHS[0]] > 1e-4).all()


# Layouts ----------------------------------------------------------------------------------------------

PATTERN, HEAD = "M-*-W-P-", "/P-"
LAYOUTS = {
    "tp2-sp": (2, PATTERN, f"{TP2} {SP}"),
    "cp2": (2, PATTERN, CP2),
    "pp4": (4, _at(PATTERN, 2, 4, 6), "--pipeline-model-parallel-size 4"),
    "pp2-vpp2-dp2": (4, _at(PATTERN, 1, 3, 6), PP2),
    "tp2-sp-cp2": (4, PATTERN, f"{TP2} {SP} {CP2} {FULL}"),
}


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory):
    """Weights, and what one process makes of them."""
    found = {}
    for heads, flags in (("", ""), (HEAD, "--mtp-num-layers 1")):
        where = folder(tmp_path_factory.mktemp("packing"))
        ranks(1).run(initial_checkpoint, pattern=PATTERN + heads, folder=where, flags=flags)
        alone = ranks(1).run(losses, pattern=PATTERN + heads, load=where, flags=f"{PACKED} {flags}", steps=2)[0]
        found[heads] = where, alone
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(ranks, one_process, layout):
    size, pattern, flags = LAYOUTS[layout]
    where, expected = one_process[""]
    for found in ranks(size).run(losses, pattern=pattern, load=where, flags=f"{PACKED} {DP} {flags}", steps=2):
        assert np.allclose(found, expected, rtol=RTOL, atol=0)


def test_prediction_heads_equal_one_process(ranks, one_process):
    where, expected = one_process[HEAD]
    flags = f"{PACKED} {DP} {TP2} {SP} --mtp-num-layers 1 --hybrid-recompute intra ssm"
    for found in ranks(2).run(losses, pattern=f"{PATTERN}{HEAD}", load=where, flags=flags, steps=2):
        assert np.allclose(found, expected, rtol=RTOL, atol=0)


def test_prediction_heads_look_ahead_inside_documents_under_context_parallelism(ranks):
    documents = [[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]]
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    shifted = np.array([[2, 3, 4, 0, 6, 0, 8, 0], [0, 3, 4, 5, 6, 7, 8, 0]])
    first, second = ranks(2).run(look_ahead, tokens=tokens, documents=documents)
    assert first == (shifted[:, [0, 1, 6, 7]].tolist(), shifted[:, [0, 1, 6, 7]].sum())
    assert second == (shifted[:, 2:6].tolist(), shifted[:, 2:6].sum())
