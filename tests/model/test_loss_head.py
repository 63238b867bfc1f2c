"""The loss without the logits (--loss-kernel fused) against upstream's, in every layout."""

from typing import Any

import pytest

from tests.model.test_layouts import CP2, DP, EP2, PP2, RTOL, SP, TP2, _at
from tests.support.training import Run, losses

FUSED, MASK, PER_TOKEN = "--loss-kernel fused", "--eod-mask-loss", "--calculate-per-token-loss"
UNTIED = "--untie-embeddings-and-output-weights"

# What the ranks run ---------------------------------------------------------------------------------


def stepped(
    pattern: str, load: str, flags: str, chunk_bytes: int = 2**30, accumulates: bool | None = None
) -> dict[str, Any]:
    """Loss, gradient norm and this rank's gradients of the first step from saved weights.

    chunk_bytes: As :data:`megatron_hybrid.accounting.loss_chunks.CHUNK_BYTES`.
    accumulates: Whether the head adds to the gradient buffer itself; None: as the flags say.
    """
    from megatron_hybrid.accounting import loss_chunks

    before, loss_chunks.CHUNK_BYTES = loss_chunks.CHUNK_BYTES, chunk_bytes
    try:
        run = Run(pattern, f"--load {load} --no-load-optim --no-load-rng --finetune {flags}")
        heads = [getattr(_unwrapped(chunk), "output_layer", None) for chunk in run.model]
        for head in filter(None, heads if accumulates is not None else []):
            head.gradient_accumulation_fusion = accumulates
        loss, norm = run.step()
    finally:
        loss_chunks.CHUNK_BYTES = before
    gradients = {
        f"{i}.{name}": p.main_grad.detach().clone()
        for i, chunk in enumerate(run.model)
        for name, p in chunk.named_parameters()
    }
    return {
        "heads": {type(head).__name__ for head in heads if head is not None},
        "log": _heads_log(),
        "names": [sorted(_unwrapped(chunk).sharded_state_dict()) for chunk in run.model],
        "step": (loss, norm),
        "gradients": gradients,
    }


def _heads_log() -> list[float]:
    """What is logged of prediction heads: losses, and how many of their tokens were the most likely ones."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    return [float(x) for name in sorted(tracker) if hasattr(tracker[name], "flatten") for x in tracker[name].flatten()]


def _unwrapped(chunk: Any) -> Any:
    from megatron.core.utils import unwrap_model

    return unwrap_model(chunk)


# Tests ----------------------------------------------------------------------------------------------

DENSE, HEADS, MOE = "M-*-", "M-*-/*-/*-", "ME*E"
MTP = "--mtp-num-layers 2"

# Flags of the model, its pattern, processes, the pattern with stages, flags of the layout
CASES = {
    "one-process": ("", DENSE, 1, DENSE, "--micro-batch-size 2"),
    "masked": (MASK, DENSE, 1, DENSE, ""),
    "per-token": (f"{MASK} {PER_TOKEN}", DENSE, 1, DENSE, "--micro-batch-size 4"),
    "untied": (f"{UNTIED} {MASK}", DENSE, 1, DENSE, ""),
    "padded": (f"{UNTIED} --make-vocab-size-divisible-by 48", DENSE, 1, DENSE, ""),
    "packed": (f"{MASK} --reset-attention-mask", DENSE, 1, DENSE, ""),
    "heads": (f"{MASK} {MTP}", HEADS, 1, HEADS, ""),
    "heads-untied": (f"{MTP} {UNTIED}", HEADS, 1, HEADS, ""),
    "detached-heads": (f"{MTP} --mtp-detach-heads", HEADS, 1, HEADS, ""),
    "dp2-overlapped": (UNTIED, DENSE, 2, DENSE, f"{DP} --overlap-grad-reduce --overlap-param-gather"),
    "tp2": (f"{UNTIED} {MASK}", DENSE, 2, DENSE, TP2),
    "tp2-sp": (MASK, DENSE, 2, DENSE, f"{TP2} {SP} {DP}"),
    "tp2-sp-heads": (f"{MASK} {MTP}", HEADS, 2, HEADS, f"{TP2} {SP}"),
    "tp2-heads-per-token": (f"{MASK} {MTP} {PER_TOKEN}", HEADS, 2, HEADS, TP2),
    "cp2": (MASK, DENSE, 2, DENSE, CP2),
    "cp2-per-token": (f"{MASK} {PER_TOKEN}", DENSE, 2, DENSE, CP2),
    "cp2-heads-packed": (f"{MASK} {MTP} --reset-attention-mask", HEADS, 2, HEADS, CP2),
    "pp2": (MASK, DENSE, 2, _at(DENSE, 2), PP2),
    "pp2-untied": (UNTIED, DENSE, 2, _at(DENSE, 2), PP2),
    "pp2-heads": (MTP, HEADS, 2, _at(HEADS, 2), PP2),
    "pp2-vpp2": (MASK, DENSE, 2, _at(DENSE, 1, 2, 3), f"{PP2} {DP}"),
    "tp2-sp-pp2": (MASK, DENSE, 4, _at(DENSE, 2), f"{TP2} {SP} {PP2}"),
    "tp2-sp-cp2": (f"{UNTIED} {MASK}", DENSE, 4, DENSE, f"{TP2} {SP} {CP2}"),
    "experts": ("", MOE, 2, MOE, f"{EP2} {DP}"),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loss(ranks, reference, case):
    """One process's plain losses and norms over three steps; each gradient of the plain loss in the same layout.

    In chunks of 8 tokens: the vocabulary has 64 entries of 4 bytes, or 32 on each of two ranks.
    """
    own, pattern, size, staged, layout = CASES[case]
    where, expected = reference(pattern, own)
    chunk = 8 * 64 * 4 // (2 if TP2 in layout else 1)
    for found in ranks(size).run(losses, pattern=staged, load=where, flags=f"{own} {layout} {FUSED}"):
        assert found == [pytest.approx(step, rel=RTOL) for step in expected]
    plains, *others = (
        ranks(size).run(
            stepped,
            pattern=staged,
            load=where,
            flags=f"{own} {layout} {kernel}",
            chunk_bytes=chunk,
            accumulates=accumulates,
        )
        for kernel, accumulates in (("--loss-kernel plain", None), (FUSED, False), (FUSED, True))
    )
    for plain, fused in [*zip(plains, others[0], strict=True), *zip(plains, others[1], strict=True)]:
        assert plain["heads"] <= {"ColumnParallelLinear"} and fused["heads"] <= {"LossHead"}
        assert fused["names"] == plain["names"]
        assert fused["step"] == pytest.approx(plain["step"], rel=1e-6)
        assert fused["log"] == pytest.approx(plain["log"], rel=1e-6)
        assert bool(plain["log"]) == (MTP in own and bool(plain["heads"]))
        for name, gradient in plain["gradients"].items():
            error = (fused["gradients"][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), f"{name}: {error}"
    assert any(fused["heads"] == {"LossHead"} for fused in others[1])


def test_bf16(ranks, reference):
    where, _ = reference(DENSE, MASK)
    plain, fused = (
        ranks(1).run(stepped, pattern=DENSE, load=where, flags=f"{MASK} --bf16 --loss-kernel {kernel}")[0]
        for kernel in ("plain", "fused")
    )
    # the head's gradients are scaled before or after they are rounded to 2^-9; vectors of eight entries cancel further
    assert fused["step"] == pytest.approx(plain["step"], rel=2e-3)
    for name, gradient in plain["gradients"].items():
        limit = 1e-2 if gradient.numel() > 100 else 5e-2
        assert (fused["gradients"][name] - gradient).norm() <= limit * gradient.norm(), name


def logits_and_losses(load: str, kernel: str) -> list[Any]:
    """Of an evaluation: logits without labels, losses with them, and logits again."""
    import torch

    run = Run(DENSE, f"--load {load} --finetune --no-load-optim --no-load-rng --loss-kernel {kernel}")
    tokens = torch.arange(32)[None]
    (model,) = run.model
    model.eval()
    with torch.no_grad():
        return [model(tokens, tokens, None, labels=labels).clone() for labels in (None, tokens, None)]


def test_without_labels_there_are_logits(ranks, reference):
    where, _ = reference(DENSE, "")
    plain, fused = (ranks(1).run(logits_and_losses, load=where, kernel=kernel)[0] for kernel in ("plain", "fused"))
    assert fused[0].shape == (1, 32, 64) and fused[1].shape == (1, 32)
    for a, b in zip(fused, plain, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
