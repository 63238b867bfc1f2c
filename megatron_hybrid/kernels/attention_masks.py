"""Which keys a query of causal attention sees: windows, sinks, documents; and what is made of documents once.

Shape letters: b samples, s positions, sq queries, sk keys.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def visible(
    sq: int,
    sk: int,
    window: int | None,
    sinks: int,
    offset: int,
    device: torch.device,
    documents: Tensor | None = None,
) -> Tensor:
    """The boolean mask of the keys that each query sees (True), [sq, sk], or [b, 1, sq, sk] with documents [b, s]."""
    i = torch.arange(offset, offset + sq, device=device)[:, None]  # [sq, 1]
    j = torch.arange(sk, device=device)[None, :]  # [1, sk]
    start = 0 if documents is None else document_starts(documents)[:, None, offset : offset + sq, None]  # [b, 1, sq, 1]
    seen = (j <= i) & (j >= start)  # [sq, sk] or [b, 1, sq, sk]
    if window is not None:
        seen = seen & ((i - j < window) | (j - start < sinks))
    return seen


def document_starts(documents: Tensor) -> Tensor:
    """Document ids [b, s] to the position of the first token of each token's document, [b, s] int32."""
    i = torch.arange(documents.shape[1], device=documents.device, dtype=torch.int32).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # [b, s], True at first tokens
    return torch.where(starts, i, 0).cummax(1).values


def document_ends(documents: Tensor) -> Tensor:
    """Document ids [b, s] to the position behind the last token of each token's document, [b, s] int32."""
    i = torch.arange(1, documents.shape[1] + 1, device=documents.device, dtype=torch.int32).expand_as(documents)
    ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)  # [b, s], True at last tokens
    return torch.where(ends, i, documents.shape[1]).flip(1).cummin(1).values.flip(1)


_masks = WeakTensorKeyDictionary()
"""Tensor of document ids to its masks, by the arguments that each was made with."""


def cached(documents: Tensor | None, rule: tuple, make: Callable[[Tensor | None], Any]) -> Any:
    """``make(documents)``, cached for as long as ``documents`` lives and is not changed; not cached without one."""
    if documents is None:
        return make(None)
    known = _masks.setdefault(documents, {})
    rule = (documents._version, *rule)
    if rule not in known:
        known[rule] = make(documents.clone())  # a mask that refers to the tensor itself would keep it alive
    return known[rule]
