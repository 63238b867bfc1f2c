"""Softmax attention, wherever a layer has it: FLOPs, cached positions, kernel, saved tensors, messages."""

from typing import Any

from megatron_hybrid.accounting.activation_settings import ActivationSettings
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


def core_kernel(settings: ActivationSettings, widths: tuple[int, int], masked: bool, chunk: bool = False) -> str:
    """The kernel of our attention core: ``kernel_for`` of ``kernels/attention.py``, which imports torch.

    Args:
        settings: Device, precision, --attention-kernel.
        widths: Head sizes of Q and K, and of V.
        masked: Queries do not see all keys before them.
        chunk: There are keys before the first query (context parallelism).
    """
    if settings.device == "cpu":
        return "sdpa"
    prefer, dropout, capability = settings.attention_kernel, settings.attention_dropout, settings.capability
    wide, half = max(widths), settings.bytes_each == 2 and all(width % 8 == 0 for width in widths)
    ours = half and wide <= 256 and not dropout and capability >= (8, 0)
    if masked:
        return "triton" if ours and prefer != "torch" else "flex"
    if ours and (prefer == "triton" or (prefer != "torch" and chunk)):
        return "triton"
    unequal = widths[0] != widths[1] and capability[0] == 9 and wide <= 128
    if not chunk and half and (prefer == "cudnn" or (prefer != "torch" and unequal)):
        return "cudnn"
    return "sdpa"


def kernel_in_words(args: Any, widths: tuple[int, int], window: int | None) -> str:
    """For the report of a run: what computes attention; with context parallelism the later chunks may have another."""
    settings = ActivationSettings(
        bytes_each=2 if args.bf16 or args.fp16 else 4,
        device=args.device,
        attention_kernel=args.attention_kernel,
        capability=args.device_capability or (9, 0),
        attention_dropout=args.attention_dropout,
    )
    masked = args.reset_attention_mask or (window is not None and window < args.seq_length)
    chunks = {False, args.context_parallel_size > 1}
    words = {"triton": "Triton", "cudnn": "cuDNN", "flex": "FlexAttention"}
    words["sdpa"] = "torch, with a mask" if masked else "torch, padded" if widths[0] != widths[1] else "torch"
    return " and ".join(dict.fromkeys(words[core_kernel(settings, widths, masked, chunk)] for chunk in sorted(chunks)))


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
