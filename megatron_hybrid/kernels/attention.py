"""Causal softmax attention, full or with a sliding window and sinks, with V as wide as it likes."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    offset: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of queries at positions ``offset, offset + 1, ...`` to keys at ``0, 1, ...``.

    A query at position i sees the keys j <= i; with a window, only those with i - j < window or j < sinks
    (Bae et al., arXiv:2510.04800, section 2: the window of the study is 512 with 64 sinks).

    On CUDA no [q, k] matrix is stored: full attention goes to torch's fused kernels, a window to FlexAttention, which
    has no dropout. On CPU a window is a boolean mask. Gradients flow to q, k and v.

    Args:
        q: [b, h, sq, d], any floating dtype.
        k: [b, hk, sk, d]; h must be a multiple of hk (grouped queries: head i reads k and v of i // (h / hk)).
        v: [b, hk, sk, dv].
        scale: Factor of the scores.
        window: Keys that a query sees, itself included.
        sinks: First keys of the sequence that every query sees beside its window.
        offset: Position of the first query; keys beyond the last query are never read.
        dropout: Probability of dropping an attention weight.

    Returns:
        [b, h, sq, dv] in q's dtype.

    Raises:
        ValueError: Dropout with a window on CUDA.
    """
    sq, end = q.shape[2], offset + q.shape[2]
    k, v = k[:, :, :end], v[:, :, :end]
    if window is not None and window >= end:
        window = None  # every key is inside every window
    if window is None:
        return _full(q, k, v, scale, dropout)
    if q.is_cuda:
        if dropout:
            raise ValueError("Sliding windows have no attention dropout on CUDA: set --attention-dropout 0.")
        return _flex_window(q, k, v, scale, window, sinks, offset)
    mask = visible(sq, end, window, sinks, offset, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=True)


def visible(sq: int, sk: int, window: int | None, sinks: int, offset: int, device: torch.device) -> Tensor:
    """The boolean mask [sq, sk] of which keys each query sees; True means seen."""
    i = torch.arange(offset, offset + sq, device=device)[:, None]
    j = torch.arange(sk, device=device)[None, :]
    seen = j <= i
    if window is not None:
        seen &= (i - j < window) | (j < sinks)
    return seen


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, sinks: int = 0, offset: int = 0
) -> Tensor:
    """:func:`attention` written out, in the inputs' dtype; stores the scores [b, h, sq, sk]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * q @ k.transpose(-1, -2)
    mask = visible(q.shape[2], k.shape[2], window, sinks, offset, q.device)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v


def _full(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    d, dv = q.shape[-1], v.shape[-1]
    if q.is_cuda and d != dv:
        # torch's fused kernels that share key heads want equal head sizes: zeros change no score, and are cut off
        width = max(d, dv)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        if dv < width:
            return _full(q, k, v, scale, dropout)[..., :dv]
    if q.is_cuda and q.dtype == torch.float32:  # the fused kernel for fp32 shares no key heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=scale, enable_gqa=True)
    if q.is_cuda:
        bias: Any = causal_lower_right(q.shape[2], k.shape[2])
    else:
        bias = visible(q.shape[2], k.shape[2], None, 0, k.shape[2] - q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale, enable_gqa=True)


@functools.lru_cache(maxsize=16)
def _window_blocks(sq: int, sk: int, window: int, sinks: int, offset: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + offset
        return (j <= i) & ((i - j < window) | (j < sinks))

    # uncompiled it would store the whole [sq, sk] mask, several times over, to find the blocks
    return create_block_mask(seen, None, None, sq, sk, device=device, _compile=True)


@functools.lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_window(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int, offset: int) -> Tensor:
    blocks = _window_blocks(q.shape[2], k.shape[2], window, sinks, offset, str(q.device))
    return _compiled_flex_attention()(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
