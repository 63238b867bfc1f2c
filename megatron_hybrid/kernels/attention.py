"""Causal softmax attention: full or with a sliding window and sinks, inside packed documents, with V of any width.

Shape letters: b batch, h query heads, hk key and value heads, sq queries, sk keys, d head size of Q and K, dv head size
of V. The kernel knows nothing of parallelism: h and hk are the heads of this rank, and under context parallelism sq are
the queries of one chunk, with ``offset`` as its place in the sequence.
"""

import functools
import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megatron_hybrid.kernels.alignment import addressable
from megatron_hybrid.kernels.attention_masks import cached, document_ends, document_starts, visible

Preference = Literal["auto", "triton", "cudnn", "torch"]
"""auto: the fastest; triton: our kernel wherever it can serve; cudnn: cuDNN for full attention, and auto's choice where
it cannot serve; torch: what torch chooses, with padding for unequal head sizes, and FlexAttention."""
Kernel = Literal["triton", "cudnn", "sdpa", "flex"]
"""What serves a call. sdpa: scaled_dot_product_attention by torch's choice, on CPU with a mask for windows and
documents."""


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
    prefer: Preference = "auto",
) -> Tensor:
    """Attention of queries at positions ``offset, offset + 1, ...`` to keys at ``0, 1, ...``.

    A query at position i sees the keys j <= i; with a window, only those with i - j < window or j < sinks
    (Bae et al., arXiv:2510.04800, section 2: the paper's window is 512 with 64 sinks). With documents it sees only keys
    of its own document, and the sinks are the first keys of each document: the result is that of each document alone.

    On CUDA no [sq, sk] matrix is stored; :func:`kernel_for` says which kernel serves. On CPU windows and documents are
    a boolean mask. What is made of a ``documents`` tensor is cached as long as the tensor lives, so that all layers of
    a micro-batch share it. Differentiable in q, k and v.

    Args:
        q: [b, h, sq, d], any floating dtype.
        k: [b, hk, sk, d]; h must be a multiple of hk (grouped queries: head i reads head i // (h / hk) of k and v).
        v: [b, hk, sk, dv].
        scale: Factor of the scores, above 0.
        window: Keys that a query sees, including its own position; None for all.
        sinks: First keys of the sequence (or of each document) that every query sees in addition to its window.
        offset: Position of the first query; keys after the last query are never read.
        dropout: Probability of dropping an attention weight.
        documents: [b, at least offset + sq], any integer dtype: the document of each key, and of the query at the
            same position. The tokens of a document are contiguous.
        prefer: Which kernel to take where several can serve.

    Returns:
        [b, h, sq, dv] in q's dtype.

    Raises:
        ValueError: Dropout with a window or documents on CUDA, or documents of the wrong shape.
    """
    sq, end = q.shape[2], offset + q.shape[2]
    k, v = k[:, :, :end], v[:, :, :end]  # [b, hk, offset + sq, d], [b, hk, offset + sq, dv]
    if window is not None and window >= end:
        window = None  # every window holds all keys
    masked = documents is not None or window is not None
    if documents is not None and (documents.shape[0] != q.shape[0] or documents.shape[1] < end):
        raise ValueError(
            f"documents has shape {list(documents.shape)}; {q.shape[0]} samples whose queries end at {end} need "
            f"[{q.shape[0]}, at least {end}]"
        )
    if masked and q.is_cuda and dropout:
        raise ValueError(
            "Sliding windows and packed documents have no attention dropout on CUDA: set --attention-dropout 0."
        )
    kernel = kernel_for(
        prefer,
        masked=masked,
        chunk=offset > 0,
        widths=(q.shape[-1], v.shape[-1]),
        dtype=q.dtype,
        capability=_capability(q.device),
        dropout=dropout,
    )
    if kernel == "triton":
        return _triton(q, k, v, scale, window, sinks, offset, documents)
    if kernel == "flex":
        from megatron_hybrid.kernels.flex_attention import flex

        return flex(q, k, v, scale, window, sinks, offset, documents)
    if not masked:
        return _full(q, k, v, scale, dropout, kernel)
    rule = sq, end, window, sinks, offset
    mask = cached(documents, rule, lambda ids: visible(*rule, q.device, ids))  # [sq, sk] or [b, 1, sq, sk]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=True)


def kernel_for(
    prefer: Preference,
    *,
    masked: bool,
    chunk: bool,
    widths: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    dropout: float,
) -> Kernel:
    """The kernel that serves a call. For cuDNN, torch has the last word (:func:`_full`).

    Args:
        prefer: The user's wish.
        masked: There is a window or there are documents.
        chunk: There are keys before the first query, as under context parallelism.
        widths: Head sizes of Q and K, and of V.
        dtype: Of q, k and v.
        capability: Of the CUDA device; None for the CPU.
        dropout: Of attention weights.
    """
    if capability is None:
        return "sdpa"
    wide, half = max(widths), dtype in (torch.bfloat16, torch.float16) and all(width % 8 == 0 for width in widths)
    ours = half and wide <= 256 and not dropout and capability >= (8, 0) and _has_triton()
    if masked:
        return "triton" if ours and prefer != "torch" else "flex"
    if ours and (prefer == "triton" or (prefer != "torch" and chunk)):
        return "triton"
    # torch's choice is cuDNN on Hopper where the head sizes are equal; unequal ones have been tried there alone
    unequal = widths[0] != widths[1] and capability[0] == 9 and wide <= 128
    if not chunk and half and (prefer == "cudnn" or (prefer != "torch" and unequal)):
        return "cudnn"
    return "sdpa"


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


def _triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: int, offset: int, documents: Tensor | None
) -> Tensor:
    """Attention by our own kernel: arguments and result of :func:`attention`."""
    from megatron_hybrid.kernels.triton.window_attention import Rule, window_attention

    bounds = cached(documents, ("bounds",), _bounds)
    return window_attention(q, k, v, Rule(scale, window, sinks, offset), *bounds)


def _bounds(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where each position's document begins and where it ends, [b, s] int32 each."""
    return (None, None) if documents is None else (document_starts(documents), document_ends(documents))


def _full(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, kernel: Kernel) -> Tensor:
    """Full causal attention, the last query at the last key: arguments and result of :func:`attention`."""
    if kernel == "cudnn" and can_use_cudnn_attention(SDPAParams(q, k, v, None, dropout, True, True)):
        q, k, v = (addressable(t) for t in (q, k, v))  # torch does not ask cuDNN whether the strides suit it
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=scale, enable_gqa=True)
    d, dv = q.shape[-1], v.shape[-1]
    if d != dv:
        # torch's other fused kernels need equal head sizes; the rest store the scores. Zeros in Q and K change no
        # score, and those in V are cut off.
        width = max(d, dv)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))  # [b, h or hk, sq or sk, width]
    if q.is_cuda and q.dtype == torch.float32:  # the fused kernel for fp32 has no grouped queries
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # [b, h, sk, width]
    if q.shape[2] == k.shape[2]:
        bias: Any = None
    elif q.is_cuda:
        bias = causal_lower_right(q.shape[2], k.shape[2])
    else:
        bias = visible(q.shape[2], k.shape[2], None, 0, k.shape[2] - q.shape[2], q.device)  # [sq, sk]
    out = F.scaled_dot_product_attention(q, k, v, bias, dropout, bias is None, scale=scale, enable_gqa=True)
    return out if out.shape[-1] == dv else out[..., :dv]


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
