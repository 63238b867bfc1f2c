"""Causal softmax attention: full or with a sliding window and sinks, inside packed documents, with V of any width.

Shape letters: b batch, h query heads, hk key and value heads, sq queries, sk keys, d head size of Q and K, dv head size
of V, nq and nk blocks of queries and of keys. The kernel knows nothing of parallelism: h and hk are the heads of this
rank, and under context parallelism sq are the queries of one chunk, with ``offset`` as its place in the sequence.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakTensorKeyDictionary


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    offset: int = 0,
    dropout: float = 0.0,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of queries at positions ``offset, offset + 1, ...`` to keys at ``0, 1, ...``.

    A query at position i sees the keys j <= i; with a window, only those with i - j < window or j < sinks
    (Bae et al., arXiv:2510.04800, section 2: the paper's window is 512 with 64 sinks). With documents it sees only keys
    of its own document, and the sinks are the first keys of each document: the result is that of each document alone.

    On CUDA no [sq, sk] matrix is stored: full attention uses torch's fused kernels; windows and documents use
    FlexAttention, which has no dropout. On CPU windows and documents are a boolean mask. The masks of a ``documents``
    tensor are cached as long as the tensor lives, so that all layers of a micro-batch share them. Differentiable in q,
    k and v.

    Args:
        q: [b, h, sq, d], any floating dtype.
        k: [b, hk, sk, d]; h must be a multiple of hk (grouped queries: head i reads head i // (h / hk) of k and v).
        v: [b, hk, sk, dv].
        scale: Factor of the scores.
        window: Keys that a query sees, including its own position; None for all.
        sinks: First keys of the sequence (or of each document) that every query sees in addition to its window.
        offset: Position of the first query; keys after the last query are never read.
        dropout: Probability of dropping an attention weight.
        documents: [b, at least offset + sq], any integer dtype: the document of each key, and of the query at the
            same position. The tokens of a document are contiguous.

    Returns:
        [b, h, sq, dv] in q's dtype.

    Raises:
        ValueError: Dropout with a window or documents on CUDA, or documents of the wrong shape.
    """
    sq, end = q.shape[2], offset + q.shape[2]
    k, v = k[:, :, :end], v[:, :, :end]  # [b, hk, offset + sq, d], [b, hk, offset + sq, dv]
    if window is not None and window >= end:
        window = None  # every window holds all keys
    if documents is None and window is None:
        return _full(q, k, v, scale, dropout)
    if documents is not None and (documents.shape[0] != q.shape[0] or documents.shape[1] < end):
        raise ValueError(
            f"documents has shape {list(documents.shape)}; {q.shape[0]} samples whose queries end at {end} need "
            f"[{q.shape[0]}, at least {end}]"
        )
    if q.is_cuda:
        if dropout:
            raise ValueError(
                "Sliding windows and packed documents have no attention dropout on CUDA: set --attention-dropout 0."
            )
        return _flex(q, k, v, scale, window, sinks, offset, documents)
    rule = sq, end, window, sinks, offset
    mask = _cached_mask(documents, rule, lambda ids: visible(*rule, q.device, ids))  # [sq, sk] or [b, 1, sq, sk]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=True)


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


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    offset: int = 0,
    documents: Tensor | None = None,
) -> Tensor:
    """The reference for :func:`attention`, in the dtype of its inputs; stores the scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [b, h, sk, d], [b, h, sk, dv]
    scores = scale * q @ k.transpose(-1, -2)  # [b, h, sq, sk]
    mask = visible(q.shape[2], k.shape[2], window, sinks, offset, q.device, documents)  # [sq, sk] or [b, 1, sq, sk]
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v


def _full(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Full causal attention, the last query at the last key: arguments and result of :func:`attention`."""
    d, dv = q.shape[-1], v.shape[-1]
    if d != dv:
        # torch's fused kernels need equal head sizes; the others store the scores. Zeros in Q and K change no score,
        # and those in V are cut off (tools/benchmarks/attention.py compares the alternatives).
        width = max(d, dv)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))  # [b, h or hk, sq or sk, width]
        if dv < width:
            return _full(q, k, v, scale, dropout)[..., :dv]
    if q.is_cuda and q.dtype == torch.float32:  # the fused kernel for fp32 has no grouped queries
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # [b, h, sk, d]
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=scale, enable_gqa=True)
    if q.is_cuda:
        bias: Any = causal_lower_right(q.shape[2], k.shape[2])
    else:
        bias = visible(q.shape[2], k.shape[2], None, 0, k.shape[2] - q.shape[2], q.device)  # [sq, sk]
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale, enable_gqa=True)


_masks = WeakTensorKeyDictionary()
"""Tensor of document ids to its masks, by the arguments that each was made with."""


def _cached_mask(documents: Tensor | None, rule: tuple, make: Callable[[Tensor | None], Any]) -> Any:
    """``make(documents)``, cached for as long as ``documents`` lives and is not changed; not cached without one."""
    if documents is None:
        return make(None)
    known = _masks.setdefault(documents, {})
    rule = (documents._version, *rule)
    if rule not in known:
        known[rule] = make(documents.clone())  # a mask that refers to the tensor itself would keep it alive
    return known[rule]


def _blocks(
    sq: int, sk: int, window: int | None, sinks: int, offset: int, device: torch.device, documents: Tensor | None
) -> Any:
    """FlexAttention's form of :func:`visible`: which blocks of queries and keys have any visible pair, and which all.

    It is computed from the first and last position of each block. ``create_block_mask`` evaluates every pair: it
    stores them all unless it is compiled, which takes minutes at some lengths.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = 128
    i0 = torch.arange(offset, offset + sq, size, device=device)[:, None]  # first position of each block, [nq, 1]
    j0 = torch.arange(0, sk, size, device=device)[None, :]  # [1, nk]
    i1, j1 = (i0 + size - 1).clamp(max=offset + sq - 1), (j0 + size - 1).clamp(max=sk - 1)
    ids = torch.zeros(1, sk, device=device) if documents is None else documents
    starts = document_starts(ids)  # [b, sk]
    first, last = starts[:, i0], starts[:, i1]  # start of the document of a block's first and last query, [b, nq, 1]
    # Blocks with some visible pair and with only visible pairs, [b, nq, nk]
    some = (j0 <= i1) & (j1 >= (first if window is None else first.clamp(min=i0 - window + 1)))
    every = (j1 <= i0) & (j0 >= last) & (i1 - i0 == size - 1) & (j1 - j0 == size - 1)
    if window is not None:
        some = some | ((j0 <= i1) & (j0 - first < sinks) & (j1 >= first) & (sinks > 0))
        every = every & ((i1 - j0 < window) | (j1 - last < sinks))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + offset
        start = 0 if documents is None else starts[b, i]
        if window is None:
            return (j <= i) & (j >= start)
        return (j <= i) & (j >= start) & ((i - j < window) | (j - start < sinks))

    parts: list[Tensor] = []
    for blocks in (some & ~every, every):
        blocks = blocks[:, None]  # [b, 1, nq, nk]: the same for all heads
        parts += blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(sq, sk))


_window_blocks = functools.lru_cache(maxsize=16)(_blocks)


@functools.lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    """FlexAttention, compiled for each combination of shapes, window and offset.

    Uncompiled it stores the scores, and torch silently falls back to that after eight compilations of one function.
    Windowed and full layers, several head sizes, and the two chunks of context parallelism soon exceed eight.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256):
            return compiled(*args, **kwargs)

    return run


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    sinks: int,
    offset: int,
    documents: Tensor | None,
) -> Tensor:
    """Attention by FlexAttention: arguments and result of :func:`attention`."""
    rule = q.shape[2], k.shape[2], window, sinks, offset, q.device
    if documents is None:
        blocks = _window_blocks(*rule, None)
    else:
        blocks = _cached_mask(documents, rule, lambda ids: _blocks(*rule, ids))
    return _compiled_flex_attention()(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # its kernel for short sequences does not support all shapes
    )
