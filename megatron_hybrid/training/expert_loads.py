"""How many tokens each expert gets, counted where Megatron's routers have decided."""

import re
from argparse import Namespace
from typing import Any

from torch import Tensor

from megatron_hybrid.layers.registry import LAYERS

COUNTER = "tokens_of_experts"
"""Attribute of a router: its rank's tokens of each expert since they were read, int64 [experts]."""


def count_tokens_of_experts(chunks: list) -> None:
    """Makes routers count their tokens (core/transformer/moe/router.py:728), with an expert bias or without.

    Upstream counts there for the bias alone, in float32, and sets the count to zero in each step. As upstream does, a
    token is counted where gradients are on: once under recomputation, and not in an evaluation. With a capacity, what
    is dropped is not counted. The cost is a sum over the routing map of each micro-batch, without synchronisation.

    Args:
        chunks: The model's parts on this rank, before the first step: a captured graph keeps using the same counter.
    """
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    for _, router in routers(chunks):
        zeros = torch.zeros(router.config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device())
        router.register_buffer(COUNTER, zeros, persistent=False)
    upstreams = TopKRouter._apply_expert_bias
    if upstreams.__module__ == __name__:
        return

    def counting(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if self.training and torch.is_grad_enabled() and hasattr(self, COUNTER):
            with torch.no_grad():
                chosen = routing_map if padding_mask is None else routing_map & ~padding_mask.view(-1, 1)
                getattr(self, COUNTER).add_(chosen.sum(dim=0))
        upstreams(self, routing_map, padding_mask=padding_mask)

    TopKRouter._apply_expert_bias = counting


def expert_loads(chunks: list) -> dict[str, list[float]]:
    """The share of tokens of each expert since the last call, in every layer of experts; every rank must call.

    Tensor-, context- and data-parallel ranks route tokens of their own, and a stage has its own layers: one sum over
    all ranks makes the whole. Tensor-parallel ranks without sequence parallelism count the same tokens, which changes
    no share. Tokens of a step that upstream's rerun machine does twice count twice.

    Args:
        chunks: The model's parts on this rank.

    Returns:
        Layer to shares, which add up to 1: "4" is the fourth layer of the pattern, "mtp 1.2" the second one of the
        first prediction head. The same on all ranks; without layers that have had no token, and empty without experts.
    """
    import torch
    from megatron.training.global_vars import get_args

    args = get_args()
    names = layers_of_experts(args)
    if not names:
        return {}
    counts = torch.zeros(len(names), args.num_experts, dtype=torch.int64, device=torch.cuda.current_device())
    for name, router in routers(chunks):
        tokens = getattr(router, COUNTER)
        counts[names.index(name)] += tokens
        tokens.zero_()
    torch.distributed.all_reduce(counts)
    shares = (counts.double() / counts.sum(1, keepdim=True)).tolist()
    return {name: row for name, row in zip(names, shares, strict=True) if row[0] == row[0]}  # none of no tokens


def layers_of_experts(args: Namespace) -> list[str]:
    """The layers of experts in a model, as :func:`expert_loads` names them."""
    main, *heads = args.hybrid_layer_pattern.replace("|", "").split("/")
    heads = heads[:1] if args.mtp_use_repeated_layer else heads  # one set of weights for all
    names = [str(i + 1) for i, symbol in enumerate(main) if LAYERS[symbol].has_experts]
    return names + [
        f"mtp {h + 1}.{i + 1}" for h, head in enumerate(heads) for i, s in enumerate(head) if LAYERS[s].has_experts
    ]


def routers(chunks: list) -> list[tuple[str, Any]]:
    """The routers on this rank, with the names of their layers."""
    from megatron.core.transformer.moe.router import TopKRouter

    found = []
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if isinstance(module, TopKRouter):
                # the path alone says which head a layer is in; its layer_number is that in the pattern
                head = re.search(r"\bmtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.", path)
                name = f"mtp {int(head[1]) + 1}.{int(head[2]) + 1}" if head else str(module.layer_number)
                found.append((name, module))
    return found
