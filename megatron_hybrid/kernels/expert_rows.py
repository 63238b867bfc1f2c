"""Tokens into the order of experts and back: one pass over memory each way, forward and backward, without waiting for
the device.

Shape letters: t tokens, e experts, n rows (pairs of a token and one of its experts), h channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def permute(
    tokens: Tensor, routing: Tensor, probabilities: Tensor | None, n: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A row for each pair of a token and one of its experts, by expert and then by token.

    Args:
        tokens: [t, h] of :data:`DTYPES`.
        routing: [t, e] bool: which experts a token is routed to.
        probabilities: [t, e], or None.
        n: Number of pairs; what would come behind is left out.

    Returns:
        Rows [n, h], their probabilities [n] or None, and the map that :func:`unpermute` takes.

    Raises:
        ValueError: t x e is no int32.
    """
    if routing.numel() >= 2**31:
        raise ValueError(f"{routing.shape[0]} tokens x {routing.shape[1]} experts must be below 2^31: fewer tokens")
    return _Permute.apply(tokens, probabilities, routing, n)


def unpermute(rows: Tensor, row_map: Tensor, tokens: int) -> Tensor:
    """For each token the sum of its rows, by expert and in fp32, rounded once.

    Args:
        rows: [n, h], ordered as :func:`permute` orders.
        row_map: Its map.
        tokens: t.

    Returns:
        [t, h] of the type of rows.
    """
    return _Unpermute.apply(rows, row_map, tokens)


def permute_reference(tokens: Tensor, routing: Tensor, probabilities: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`permute` by its words; in place of the map the token of each row."""
    expert, token = routing.T.nonzero(as_tuple=True)  # [n] each, by expert and then by token
    return tokens[token[:n]], probabilities[token[:n], expert[:n]], token[:n]


def unpermute_reference(rows: Tensor, token: Tensor, tokens: int) -> Tensor:
    """:func:`unpermute` by its words, from the token of each row."""
    return torch.zeros(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, token, rows)


class _Permute(torch.autograd.Function):
    """The backward pass sums a token's rows in order: upstream's adds them in the order in which threads arrive."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probabilities: Tensor | None, routing: Tensor, n: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        from .triton.expert_permutation import place_rows, sum_rows

        row_map, sorted_probabilities = place_rows(routing.contiguous(), probabilities, n)
        pairs, _, _ = parts_of(row_map, n, len(tokens))
        permuted = sum_rows(_rows(tokens), pairs[:, None], divisor=routing.shape[1])  # [n, h]
        ctx.save_for_backward(row_map)
        ctx.shape, ctx.n = routing.shape, n
        ctx.mark_non_differentiable(row_map)
        return permuted, sorted_probabilities, row_map

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_sorted: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        from .triton.expert_permutation import sum_rows

        (row_map,) = ctx.saved_tensors
        pairs, rows, number = parts_of(row_map, ctx.n, ctx.shape[0])
        d_tokens = sum_rows(_rows(d_rows), rows, number) if ctx.needs_input_grad[0] else None  # [t, h]
        d_probabilities = None
        if d_sorted is not None and ctx.needs_input_grad[1]:
            flat = d_sorted.new_zeros(ctx.shape[0] * ctx.shape[1])
            d_probabilities = flat.index_copy_(0, pairs.long(), d_sorted).view(ctx.shape)  # [t, e]
        return d_tokens, d_probabilities, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_map: Tensor, tokens: int) -> Tensor:
        from .triton.expert_permutation import sum_rows

        ctx.save_for_backward(row_map)
        ctx.n, ctx.tokens = len(rows), tokens
        _, of_token, number = parts_of(row_map, ctx.n, tokens)
        return sum_rows(_rows(rows), of_token, number)  # [t, h]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        from .triton.expert_permutation import sum_rows

        (row_map,) = ctx.saved_tensors
        pairs, of_token, _ = parts_of(row_map, ctx.n, ctx.tokens)
        return sum_rows(_rows(dy), pairs[:, None], divisor=of_token.shape[1]), None, None  # [n, h]


def parts_of(row_map: Tensor, n: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A map's parts, int32: ``token * e + expert`` of each row [n], rows of each token [t, e], their number [t]."""
    experts = (len(row_map) - n) // tokens - 1 if tokens else 1
    pairs, rows, number = row_map.split([n, tokens * experts, tokens])
    return pairs, rows.view(tokens, experts), number


def _rows(x: Tensor) -> Tensor:
    """With its channels side by side; rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()
