"""What layers are made of, in plain torch of any dtype: the formulas that their tests compare with."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def rotate(t: Tensor, base: float) -> Tensor:
    """[s, b, n, d]: pairs (i, i + d/2) turned by position * base^(-2i/d); angles in fp32, as all models have them."""
    length, half = t.shape[0], t.shape[-1] // 2
    turns = torch.arange(length)[:, None].float() / base ** (torch.arange(half).float() / half)
    cos, sin = turns.cos().to(t.dtype)[:, None, None], turns.sin().to(t.dtype)[:, None, None]
    a, b = t[..., :half], t[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def seen(length: int, window: int | None = None, sinks: int = 0) -> Tensor:
    """[s, s]: which keys (columns) a query (row) sees: those of its window, itself among them, and the sinks."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = column <= row
    return mask & ((row - column < window) | (column < sinks)) if window else mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [s, b, n, d], k [s, b, g, d], v [s, b, g', dv] to [s, b, n, dv] under the mask ``seen`` [s, s].

    Each query head attends to the keys of its group, and to the values of its group of those.
    """
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnij,jbnd->ibnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def relative_errors(ours: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of our output and each gradient, against the largest entry of what is expected.

    Args:
        ours: As :func:`tests.support.single.layer` returns it.
        expected: ``y``, ``dx``, and gradients as ``d NAME``.
    """
    got = {"y": ours["y"], "dx": ours["dx"], **{f"d {n}": g for n, g in ours["gradients"].items()}}
    errors = {}
    for name, want in expected.items():
        size = float(want.detach().abs().max()) or 1.0  # the weights of an expert that no token met
        errors[name] = float(np.abs(got[name] - want.detach().numpy()).max()) / size
    return errors
