"""Softmax attention, wherever a layer has it: FLOPs, cached positions, saved tensors, messages."""

from megatron_hybrid.accounting.saved import FP32, Rank, Saved
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, scatter


def attention_core_flops(qk_dim: int, value_dim: int, length: int, seen: int | None = None) -> float:
    """Forward FLOPs per token of Q K^T and its product with V, causal, all heads together.

    Query i sees min(i, seen) keys, itself included; the mean over i = 1..length is
    (m (m + 1) / 2 + (length - m) m) / length with m = min(seen, length). A window with sinks is
    the same with seen = window + sinks. Source: arXiv:2510.04800, Table 1.
    """
    m = length if seen is None else min(seen, length)
    keys = (m * (m + 1) / 2 + (length - m) * m) / length
    return 2 * (qk_dim + value_dim) * keys


def cached_positions(length: int, window: int | None, sinks: int) -> int:
    """Positions whose keys a later query can still see: those in the window, and the sinks."""
    return length if window is None else min(length, window + sinks)


def rope(r: Rank, head_dim: int, one_kernel: bool) -> list[Saved]:
    """Cosines and sines: one table for Q and K of all micro-batches, or upstream's for each of both.

    Args:
        r: The rank.
        head_dim: Of Q and K.
        one_kernel: Q and K come out of the projection by our kernel (``kernels/qkv_rotation.py``), else by upstream's
            operations (core/models/common/embeddings/rope_utils.py).
    """
    positions, channels = angles(r, head_dim)
    if one_kernel:
        return [Saved("RoPE: cos, sin", (positions, channels), FP32)] * r.settings.rope
    return [Saved("RoPE: cos, sin of q, k", (4, positions, channels), r.e)] * r.settings.rope


def angles(r: Rank, head_dim: int) -> tuple[int, int]:
    """Positions, and channels that turn (core/models/common/embeddings/rotary_pos_embedding.py)."""
    return r.whole.seq_length // r.layout.cp, int(head_dim * r.settings.rotary_percent)


def is_masked(r: Rank, seen: int | None) -> bool:
    """Whether a query does not see all keys before it (``kernels/attention.py``; seen is the window alone)."""
    return r.settings.packed or (seen is not None and seen < r.whole.seq_length)


def masks(r: Rank, seen: int | None) -> list[Saved]:
    """The CPU's masks, of q's dtype, for each chunk of queries and all keys up to its end, of the rank with most."""
    length, cp = r.whole.seq_length, r.layout.cp
    if not r.cpu or (cp == 1 and not is_masked(r, seen)):
        return []
    if cp == 1:
        return [Saved("mask", (length, length), r.e)]
    half = length // (2 * cp)  # chunks i and 2 cp - 1 - i of each rank
    return [Saved("masks of two chunks", (half, (2 * cp + 1) * half), r.e)]


def refuse_dropout(r: Rank) -> None:
    """Refuses dropout of scores on CPU, where torch keeps all of them.

    Raises:
        ValueError: It is on.
    """
    if r.cpu and r.settings.attention_dropout:
        raise ValueError(
            f"--attention-dropout {r.settings.attention_dropout} on CPU stores the scores, which is not counted: set 0."
        )


def keys_and_values(m: MicroBatch, widths: tuple[float, float], *inside: str) -> Exchange:
    """K and V of the whole sequence on each context-parallel rank (``TorchCoreAttention``)."""
    cp = m.layout.cp
    key, value = (scatter(cp, cp * m.size(width)) for width in widths)
    return Exchange("context", key + value, key + value, (*inside, "core_attn"))
