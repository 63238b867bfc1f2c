"""How many tokens each expert gets, counted where Megatron's routers have decided."""

from megatron_hybrid.patches.routers import COUNTER, layers_of_experts, routers


def count_tokens_of_experts(chunks: list) -> None:
    """Makes routers count their tokens (:func:`megatron_hybrid.patches.routers.count_routed_tokens`).

    Args:
        chunks: The model's parts on this rank, before the first step: a captured graph keeps using the same counter.
    """
    import torch

    for _, router in routers(chunks):
        zeros = torch.zeros(router.config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device())
        router.register_buffer(COUNTER, zeros, persistent=False)


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
