"""Whether a run computes its loss without the logits (``--loss-kernel``), and in chunks of how many tokens."""

from functools import partial
from math import ceil
from typing import Any

from megatron_hybrid.accounting.sizes import setting

CHUNK_BYTES = 2**30
"""Of the logits of a chunk, at most: 4,096 tokens of a vocabulary of 128,256 in bf16. A chunk adds to the weight's
gradient, whose bytes its products read and write: smaller ones would spend their time on that."""

NEEDS_LOGITS = {
    "fp16": "the logits' gradients are made before the loss scale is known, and small ones would vanish in fp16",
    "use_mup": "muP scales the logits",
    "cross_entropy_loss_fusion": "it chooses another kernel for the loss",
    "defer_embedding_wgrad_compute": "it keeps the logits' gradients for the end of the step",
}
"""Settings of Megatron that ``--loss-kernel fused`` cannot be combined with, and why; ``auto`` is plain there."""


def fuses_loss(args: Any) -> bool:
    """Whether output head and cross entropy are one function.

    Args:
        args: Megatron's arguments and ours; absent ones have their default. A device of auto is taken for CUDA.
    """
    get = partial(setting, args)
    kernel = get("loss_kernel", "auto")
    if kernel != "auto":
        return kernel == "fused"
    return get("device", "auto") != "cpu" and not any(get(name) for name in NEEDS_LOGITS)


def chunk_tokens(tokens: int, vocabulary: int, each: int) -> int:
    """Tokens of a chunk: as few chunks as :data:`CHUNK_BYTES` allows, of equal size, in multiples of 128 if possible.

    Args:
        tokens: Of a micro-batch on a rank.
        vocabulary: Entries on the rank, padding included.
        each: Bytes of a logit.
    """
    most = max(1, CHUNK_BYTES // (vocabulary * each))
    step = 128 if most >= 128 else 1
    chunks = ceil(tokens / (most // step * step))
    return min(tokens, ceil(tokens / (chunks * step)) * step)
