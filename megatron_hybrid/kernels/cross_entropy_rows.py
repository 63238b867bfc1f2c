"""Cross entropy of rows of logits whose vocabulary may be divided over ranks, in plain PyTorch.

:mod:`megatron_hybrid.kernels.triton.cross_entropy` has the same two functions for CUDA.

Shape letters: c tokens, v entries of the vocabulary on this rank, the first of which is number ``first``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What the loss of each token needs of its row of logits, [c] each, in fp32 (fp64 of fp64 logits)."""

    maximum: Tensor
    total: Tensor
    """Sum of exp(logit - maximum)."""
    label: Tensor
    """The label's logit, -inf where another rank, or none, has the label."""
    best: Tensor | None
    """The first column with the maximum, int64; None unless it is asked for."""


def statistics(
    logits: Tensor, labels: Tensor, first: int = 0, weights: Tensor | None = None, best: bool = False
) -> Statistics:
    """The statistics of each row; with ``weights``, its gradient in place of the logits, too.

    Args:
        logits: [c, v].
        labels: Entries of the whole vocabulary, int64 [c].
        weights: Of each token, [c]: the logits are overwritten by ``weights * (softmax - onehot)``, which is their
            gradient only if v is the whole vocabulary.
        best: Also find the column of the maximum.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [c, v]
    maximum, column = wide.max(-1)
    total = (wide - maximum[:, None]).exp().sum(-1)
    own = (labels >= first) & (labels < first + logits.shape[1])
    label = wide.gather(1, torch.where(own, labels - first, 0)[:, None])[:, 0]
    label = label.masked_fill(~own, -math.inf)
    if weights is not None:
        gradient_(logits, labels, first, maximum + total.log(), weights)
    return Statistics(maximum, total, label, column if best else None)


def gradient_(logits: Tensor, labels: Tensor, first: int, log_total: Tensor, weights: Tensor) -> None:
    """Overwrites logits [c, v] by ``weights * (softmax - onehot)``.

    Args:
        labels: int64 [c].
        log_total: Logarithm of the sum of exponentials over the whole vocabulary, [c].
        weights: [c].
    """
    wide = logits.to(log_total.dtype)
    result = (wide - log_total[:, None]).exp()
    rows = ((labels >= first) & (labels < first + logits.shape[1])).nonzero()[:, 0]
    result[rows, labels[rows] - first] -= 1
    logits.copy_(result.mul_(weights[:, None]))
