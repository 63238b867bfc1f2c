"""The Mamba-2 scan with its convolution, wherever a layer has it: FLOPs, parameters, cache, saved tensors, messages."""

from math import ceil
from typing import Literal

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.saved import FP32, Rank, Saved, projected_columns
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, by_heads

CONV_WIDTH = 4
"""Taps of the Mamba-2 convolution; Megatron has no flag for it (core/ssm/mamba_mixer.py, ``d_conv``)."""
SSD_CHUNK = 128
"""Tokens of a chunk of the Mamba-2 scan, for which it keeps one state (core/ssm/mamba_mixer.py:192, ``chunk_size``)."""

Convention = Literal["model", "paper"]
"""How FLOPs are counted: :mod:`megatron_hybrid.costs.flops`."""


def pairs_in_chunks(length: int, chunk: int, masked: bool = True) -> int:
    """Pairs of tokens of one chunk, over all chunks of a sequence; the last one may be shorter.

    Args:
        masked: Only pairs of a token with itself and those before it, q (q + 1) / 2 in a chunk of q; else all q^2.
    """
    whole, rest = divmod(length, chunk)
    if masked:
        return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    return whole * chunk**2 + rest**2


def ssm_core_flops(inner: int, state_dim: int) -> float:
    """Forward FLOPs per token of the SSM core: 9 d N + 2 d. Source: arXiv:2510.04800, Table 1."""
    return 9 * inner * state_dim + 2 * inner


def ssd_scan_flops(inner: int, groups: int, state_dim: int, length: int, masked: bool = True) -> float:
    """Forward FLOPs per token of the chunked Mamba-2 scan's matrix products.

    Per group, C B^T of the pairs in a chunk, 2 N each; all heads of the group share it. Per head, the product of these
    pairs with x, 2 p each: 2 d over all heads. Per token, the outer product B x^T that goes into the chunk's state and
    the product of C with the state before the chunk: 2 d N each. Source: arXiv:2405.21060, section 6;
    ``megatron_hybrid.kernels.ssd``, whose plain products compute the masked half too (``masked=False``).

    Sequences shorter than a chunk are one chunk. Context parallelism changes nothing: each rank scans whole sequences
    of its share of the heads.
    """
    pairs = pairs_in_chunks(length, SSD_CHUNK, masked) / length
    return pairs * 2 * (groups * state_dim + inner) + 4 * inner * state_dim


def scan_flops(inner: int, groups: int, state_dim: int, length: int, convention: Convention) -> float:
    if convention == "paper":
        return ssm_core_flops(inner, state_dim)
    return ssd_scan_flops(inner, groups, state_dim, length)


def conv_flops(inner: int, groups: int, state_dim: int) -> float:
    """Forward FLOPs per token of the depthwise convolution over x, B and C."""
    return 2 * CONV_WIDTH * (inner + 2 * groups * state_dim)


def scan_tensors(channels: int, heads: int, shared: int) -> list[int]:
    """Convolution (weight and bias), dt_bias, A_log and D, and the channels that ranks have in common."""
    common = [shared * CONV_WIDTH, shared] if shared else []
    return [channels * CONV_WIDTH, channels, heads, heads, heads, *common]


def shared_states(groups: int, state_dim: int, tp: int) -> int:
    """Rows of B and C that are whole on every rank (layers/mamba/module.py): all of fewer groups than ranks."""
    return 2 * groups * state_dim if groups < tp else 0


def scan_kernels(r: Rank) -> str:
    """``triton``, ``mamba_ssm`` or ``torch``; on CPU the last whatever is set."""
    return "torch" if r.cpu else r.settings.ssm_kernels


def scan_input(r: Rank, heads: int, head_dim: int, groups: int, state: int) -> Saved:
    """``M``: the projection as the scan gets it, padding included; under context parallelism samples of fewer heads."""
    cp, width = r.layout.cp, _channels(r, heads, head_dim, groups, state)
    return Saved("z x B C dt", (r.tokens * cp, width if cp > 1 else projected_columns(r, width)[0]), r.e)


def _channels(r: Rank, heads: int, head_dim: int, groups: int, state: int) -> int:
    """Of z, x, B, C and dt of a rank's heads."""
    cp = r.layout.cp
    return (2 * heads * head_dim + heads) // cp + 2 * max(1, groups // cp) * state


def scan_saved(r: Rank, heads: int, head_dim: int, groups: int, state: int) -> list[Saved]:
    """Convolution, scan and gate; under context parallelism whole samples of fewer heads.

    Triton's kernels (``kernels/triton/mamba.py``) keep the projection as it is and compute all else again, torch's
    (``kernels/combined.py``) and mamba_ssm's a copy of it, samples first.
    """
    cp, e, kernels = r.layout.cp, r.e, scan_kernels(r)
    t, inner, states = r.tokens * cp, heads * head_dim // cp, max(1, groups // cp) * state
    if kernels == "triton":
        return [scan_input(r, heads, head_dim, groups, state)]
    lines = [Saved("z x B C dt, samples first", (t, _channels(r, heads, head_dim, groups, state)), e)]
    if kernels == "mamba_ssm":
        return [*lines, Saved("scan's output before its gate", (t, inner), e)]
    chunks = r.layout.micro_batch * ceil(r.whole.seq_length / SSD_CHUNK)
    return [
        *lines,
        Saved("dt with bias, its softplus, dt A, clamped", (4, t, heads // cp), FP32),
        Saved("x B C after the convolution", (t, inner + 2 * states), e),
        Saved("state before each chunk", (chunks, inner, state), FP32),
    ]


def scan_cache(inner: int, groups: int, state_dim: int) -> Cache:
    """A state [head_dim, N] for each head, and the convolution's window of x, B and C.

    All CONV_WIDTH positions of the window are kept, as in the paper and upstream (core/ssm/mamba_mixer.py, conv_state),
    though the last CONV_WIDTH - 1 would do.
    """
    return Cache(conv=CONV_WIDTH * (inner + 2 * groups * state_dim), state=inner * state_dim)


def scan_exchanges(
    m: MicroBatch, inner: int, head_dim: int, groups: int, state_dim: int, *inside: str
) -> list[Exchange]:
    """z, x, B, C and dt to the scan, and its result back (core/ssm/mamba_context_parallel.py, ``pre_conv_ssm``).

    Of fewer groups than ranks, each rank gets a copy of its own. The way there is in front of what ``ssm`` repeats.
    """
    states = max(groups, m.layout.cp) * state_dim
    there = by_heads(m, [inner, inner, states, states, inner // head_dim], *inside)
    return [there, by_heads(m, [inner], *inside, "ssm")]
