"""The forward step of a micro-batch and its loss."""

from functools import partial
from typing import Any

from megatron_hybrid.training.micro_batches import next_batch


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """One micro-batch: per-token losses [b, s], and the function that reduces them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = next_batch(data_iterator, model)
    documents = batch["documents"]
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=None if documents is None else PackedSeqParams(qkv_format="sbhd", seq_idx=documents),
    )
    return losses, partial(loss, batch["loss_mask"])


def loss(mask: Any, losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Sum of the losses under the mask, number of tokens, and both for the log.

    Upstream divides the first by the second and averages over context-parallel ranks
    (core/pipeline_parallel/schedules.py:331), which is no mean over tokens where the mask leaves the ranks different
    numbers of them. So the number is that of the whole samples, and the sum is scaled by the number of ranks: the
    quotients' average is what one process computes. Under --calculate-per-token-loss upstream sums both over all ranks.

    Args:
        mask: 1.0 for each token whose loss counts, float32 [b, s / cp].
        losses: Of each token, [b, s / cp].
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    total = (losses.view(-1).float() * mask.view(-1)).sum()
    tokens = mask.sum()
    log = {"lm loss": torch.stack([total.detach(), tokens])}
    if mpu.get_context_parallel_world_size() > 1 and not get_args().calculate_per_token_loss:
        tokens = tokens.clone()
        torch.distributed.all_reduce(tokens, group=mpu.get_context_parallel_group())
        total = total * mpu.get_context_parallel_world_size()
    return total, tokens.int(), log
