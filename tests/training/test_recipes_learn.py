"""Each family of recipes, made small by flags, learns from real text."""

import math
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.single import build

# What the ranks run ---------------------------------------------------------------------------------


def learn(argv: list[str], steps: int, batch: int, lr: float) -> tuple[str, list[float]]:
    """Trains on the bytes of Python's standard library, each read once.

    Returns:
        The layer pattern, and the mean loss of each step's batch before its update, in nats per byte.
    """
    torch.manual_seed(0)
    model, args = build(argv)
    size = batch * (args.seq_length + 1)
    text = standard_library(steps * size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    positions = torch.arange(args.seq_length).expand(batch, -1)
    losses = []
    for step in range(steps):
        read = torch.frombuffer(bytearray(text[step * size : (step + 1) * size]), dtype=torch.uint8)
        read = read.long().view(batch, -1)
        loss = model.train()(read[:, :-1].contiguous(), positions, None, labels=read[:, 1:].contiguous()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return args.hybrid_layer_pattern, losses


def standard_library(size: int) -> bytes:
    """The first ``size`` bytes of Python's own modules, in the order of their names."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            return text[:size]
    raise FileNotFoundError(f"Python's standard library has {len(text)} bytes of sources, {size} are wanted")


# Tests ----------------------------------------------------------------------------------------------

# The recipe's architecture, its flags for training aside: fp32, 48 channels, bytes as tokens.
SMALL = """--no-bf16 --hidden-size 48 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2
--mamba-num-heads 6 --mamba-head-dim 16 --mamba-state-dim 16 --intra-num-attention-heads 2
--intra-num-query-groups 1 --intra-qk-dim 24 --intra-value-dim 48 --intra-ssm-dim 48 --swa-window 16 --swa-sinks 4
--seq-length 96 --max-position-embeddings 96 --vocab-size 256 --init-method-std 0.06 --num-blocks"""
SMALL_MOE = "--num-experts 4 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 48"

FAMILIES = {
    "paper-100m-llama": ("2", "*-*-"),
    "paper-100m-mamba": ("2", "M-M-"),
    "paper-100m-swa": ("2 --block-ratio 1:1", "W-*-"),
    "paper-100m-inter": ("6", "M-M-M-*-M-M-"),
    "paper-100m-intra": ("6", "M-M-M-P-M-M-"),
    "paper-1b-intra-moe": (f"6 {SMALL_MOE}", "MEMEMEPEMEME"),
}
STEPS, BATCH, LENGTH, LAST = 50, 8, 96, 5


def entropy_of_bytes(text: bytes) -> float:
    """Nats per byte of the best model that knows how often each byte is, and nothing of what stands before it."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


@pytest.mark.parametrize("recipe", FAMILIES)
def test_loss_goes_down_on_real_text(ranks, recipe):
    rest, pattern = FAMILIES[recipe]
    argv = ["--recipe", recipe, *f"{SMALL} {rest}".split()]
    found, losses = ranks(1).run(learn, argv=argv, steps=STEPS, batch=BATCH, lr=1e-2)[0]
    assert found == pattern
    # It starts from the uniform distribution over 256 bytes, give or take its small random weights.
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    # Every batch is new text, so these are losses on unseen text. The frequencies of bytes are learnt by any model that
    # has a bias; below their entropy in the very text that is predicted, the model uses what it reads.
    # (Seen: entropy 2.94, losses 2.10 to 2.61.)
    last = standard_library(STEPS * BATCH * (LENGTH + 1))[-LAST * BATCH * (LENGTH + 1) :]
    final = sum(losses[-LAST:]) / LAST
    assert final < entropy_of_bytes(last) - 0.1
    assert final < 0.7 * sum(losses[:LAST]) / LAST
