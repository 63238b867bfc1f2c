"""Choice of experts by sigmoids and a bias, forward and backward in one kernel each, in Triton.

Shape letters: t tokens, e experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON: tl.constexpr = tl.constexpr(1e-20)
"""Added to the sum of several scores, as upstream does."""


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits,
    bias,
    probabilities,
    routing,
    tokens,
    scale,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, WIDTH)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    at = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    scores = tl.sigmoid(tl.load(logits + at, there, other=0.0).to(tl.float32))
    keys = scores
    if BIASED:
        keys += tl.load(bias + e, e < EXPERTS, other=0.0).to(tl.float32)[None, :]
    keys = tl.where(keys == keys, keys, float("inf"))  # a NaN is the greatest, as for torch: a token has k experts
    keys = tl.where((e < EXPERTS)[None, :], keys, float("-inf"))
    chosen = tl.zeros((BLOCK, WIDTH), tl.int1)
    for _ in tl.static_range(TOPK):
        best = e[None, :] == tl.argmax(keys, 1)[:, None]
        chosen = chosen | best
        keys = tl.where(best, float("-inf"), keys)
    if TOPK > 1:
        scores = scores / (tl.sum(tl.where(chosen, scores, 0.0), 1) + EPSILON)[:, None]
    tl.store(probabilities + at, tl.where(chosen, scores * scale, 0.0), there)
    tl.store(routing + at, chosen.to(tl.uint8), there)


@triton.jit(do_not_specialize=["tokens"])
def _route_backward(
    logits,
    routing,
    g,
    d_logits,
    tokens,
    scale,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, WIDTH)
    there = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    at = t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    scores = tl.sigmoid(tl.load(logits + at, there, other=0.0).to(tl.float32))
    chosen = tl.load(routing + at, there, other=0) != 0
    d = tl.where(chosen, tl.load(g + at, there, other=0.0) * scale, 0.0)
    if TOPK > 1:
        total = (tl.sum(tl.where(chosen, scores, 0.0), 1) + EPSILON)[:, None]
        d = (d - tl.sum(d * scores / total, 1)[:, None]) / total
    tl.store(d_logits + at, tl.where(chosen, d * scores * (1.0 - scores), 0.0), there)


def _tile(experts: int) -> dict[str, int]:
    width = triton.next_power_of_2(experts)
    return {"EXPERTS": experts, "WIDTH": width, "BLOCK": max(1, min(128, 2048 // width))}


def route(logits: Tensor, bias: Tensor | None, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """The probabilities [t, e] fp32 of each token's experts, 0 elsewhere, and which these are, [t, e] bool.

    A token's experts are those of its ``topk`` largest ``sigmoid(logits) + bias``. Their probabilities are
    ``sigmoid(logits) * scale``, divided by the sum of them all if there are several.

    Args:
        logits: [t, e] fp32, contiguous.
        bias: [e], or None.
        topk: At most e.
        scale: Of the probabilities.
    """
    probabilities = torch.empty_like(logits)
    routing = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    tile = _tile(logits.shape[1])
    if len(logits):
        _route[(triton.cdiv(len(logits), tile["BLOCK"]),)](
            logits,
            bias,
            probabilities,
            routing.view(torch.uint8),
            len(logits),
            scale,
            TOPK=topk,
            BIASED=bias is not None,
            **tile,
        )
    return probabilities, routing


def route_backward(logits: Tensor, routing: Tensor, g: Tensor, topk: int, scale: float) -> Tensor:
    """The gradient of the logits [t, e] from that of the probabilities, g [t, e]; all contiguous."""
    d_logits = torch.empty_like(logits)
    tile = _tile(logits.shape[1])
    if len(logits):
        _route_backward[(triton.cdiv(len(logits), tile["BLOCK"]),)](
            logits, routing.view(torch.uint8), g, d_logits, len(logits), scale, TOPK=topk, **tile
        )
    return d_logits
