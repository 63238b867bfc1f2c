"""Windows and documents by torch's FlexAttention: what serves them on CUDA where our own kernel does not.

Shape letters: those of :mod:`megatron_hybrid.kernels.attention`; nq and nk blocks of queries and of keys.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels.attention_masks import cached, document_starts


def blocks(
    sq: int, sk: int, window: int | None, sinks: int, offset: int, device: torch.device, documents: Tensor | None
) -> Any:
    """FlexAttention's form of :func:`visible` (attention_masks.py): which blocks have any visible pair, and which all.

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
    for of in (some & ~every, every):
        of = of[:, None]  # [b, 1, nq, nk]: the same for all heads
        parts += of.sum(-1).int(), of.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(sq, sk))


_window_blocks = functools.lru_cache(maxsize=16)(blocks)


@functools.lru_cache(maxsize=1)
def compiled_flex_attention() -> Any:
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


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    sinks: int,
    offset: int,
    documents: Tensor | None,
) -> Tensor:
    """Attention by FlexAttention: arguments and result of :func:`megatron_hybrid.kernels.attention.attention`."""
    rule = q.shape[2], k.shape[2], window, sinks, offset, q.device
    packed = documents is not None
    mask = cached(documents, rule, lambda ids: blocks(*rule, ids)) if packed else _window_blocks(*rule, None)
    return compiled_flex_attention()(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # its kernel for short sequences does not support all shapes
    )
