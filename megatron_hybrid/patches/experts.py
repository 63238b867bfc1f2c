"""Patches of the way of tokens to their experts and back: fewer passes over memory, and none that waits for the device.

They serve all of Megatron's dispatchers and both backends. On CPUs, and with Transformer Engine's kernels
(``--moe-permute-fusion``), upstream's code runs as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import expert_choice, expert_rows, router_product
from megatron_hybrid.kernels.triton_use import can_run
from megatron_hybrid.patches.patching import Patch, Table

DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
UTILS = "core/transformer/moe/moe_utils.py"


def permute_in_one_pass(upstreams: Callable) -> Callable:
    """Brings tokens into the order of experts by :func:`.expert_rows.permute`.

    Upstream sorts a map of tokens x experts, and adds up the gradients of a token's rows by atomics in bf16.
    """

    def permute(
        tokens: Tensor,
        routing_map: Tensor,
        probs: Tensor | None = None,
        num_out_tokens: Any = None,
        fused: bool = False,
        drop_and_pad: bool = False,
        tokens_per_expert: Tensor | None = None,
        align_size: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor, None, Tensor | None]:
        supported = can_run(tokens) and tokens.dtype in expert_rows.DTYPES and routing_map.dtype == torch.bool
        if fused or drop_and_pad or num_out_tokens is None or not supported:
            return upstreams(
                tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad, tokens_per_expert, align_size
            )
        rows, row_probabilities, row_map = expert_rows.permute(tokens, routing_map, probs, int(num_out_tokens))
        return rows, row_probabilities, row_map, None, tokens_per_expert

    return permute


def unpermute_in_one_pass(upstreams: Callable) -> Callable:
    """Sums the rows of each token by :func:`.expert_rows.unpermute`: in order and in fp32.

    Upstream adds them by atomics, in bf16.
    """

    def unpermute(
        permuted_tokens: Tensor,
        sorted_indices: Tensor,
        restore_shape: torch.Size,
        probs: Tensor | None = None,
        routing_map: Tensor | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
        pad_offsets: Tensor | None = None,
    ) -> Tensor:
        ours = sorted_indices.dtype == torch.int32  # upstream's indices are int64
        if fused or drop_and_pad or not ours or probs is not None:
            return upstreams(
                permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad, pad_offsets
            )
        return expert_rows.unpermute(permuted_tokens, sorted_indices, restore_shape[0])

    return unpermute


def leave_sorted_chunks(upstreams: Callable) -> Callable:
    """Does not copy all tokens where their chunks stand in order, which is so if each rank has all experts."""

    def sort_chunks(
        input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not fused and sorted_idxs.tolist() == list(range(len(sorted_idxs))):  # on the host, if not fused
            return input, probs
        return upstreams(input, split_sizes, sorted_idxs, probs, fused)

    return sort_chunks


class CountsOnHost:
    """Numbers of tokens on their way to the host.

    Args:
        counts: [e] on the device; the copy starts at once, in order with the kernels before and after it.
    """

    def __init__(self, counts: Tensor):
        self._copy = counts.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def __call__(self) -> list[int]:
        """Waits for the copy alone."""
        self._there.synchronize()
        return self._copy.tolist()


def keep_counts_on_device(upstreams: Callable) -> Callable:
    """Leaves the numbers of tokens on the device where nothing but the experts needs them.

    Upstream waits for them in each layer. Where tokens go to other ranks the host needs them. Experts that ask for
    their ``tolist()`` wait for the copy of :class:`CountsOnHost`, and not for what was queued since.
    """

    def synchronize(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        needed = self.ep_size * self.tp_size > 1 or self.cuda_sync_point in ("before_permutation_1", "no_sync")
        if needed or self.drop_and_pad or tokens_per_expert is None or not tokens_per_expert.is_cuda:
            return upstreams(self, point, tokens_per_expert)
        if point == self.cuda_dtoh_point and not torch.cuda.is_current_stream_capturing():
            tokens_per_expert.tolist = CountsOnHost(tokens_per_expert)
        return tokens_per_expert

    return synchronize


def multiply_in_bf16(upstreams: Callable) -> Callable:
    """Computes a router's fp32 scores by :func:`.router_product.router_product`.

    Upstream, without Transformer Engine, copies all tokens to fp32 in each pass. The numbers are the same but for the
    order of sums.
    """

    def router_gating_linear(inp: Tensor, weight: Tensor, bias: Tensor | None, router_dtype: torch.dtype) -> Tensor:
        if bias is None and router_dtype == torch.float32 and router_product.takes(inp, weight):
            return router_product.router_product(inp, weight)
        return upstreams(inp, weight, bias, router_dtype)

    return router_gating_linear


def choose_in_one_kernel(upstreams: Callable) -> Callable:
    """Chooses experts by sigmoids in :func:`.expert_choice.choose_experts`.

    Upstream takes some twenty operations on [tokens, experts], and a sort of each token's scores.
    """

    def topk_routing(
        logits: Tensor,
        topk: int,
        use_pre_softmax: bool = False,
        num_groups: int | None = None,
        group_topk: int | None = None,
        scaling_factor: float | None = None,
        score_function: str = "softmax",
        expert_bias: Tensor | None = None,
        fused: bool = False,
        router_replay: Any = None,
        dense_output: bool = False,
        precomputed_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        supported = can_run(logits) and logits.dtype == torch.float32 and score_function == "sigmoid"
        supported = supported and topk <= logits.shape[1] <= expert_choice.MOST_EXPERTS
        special = fused or group_topk or router_replay is not None or dense_output or precomputed_indices is not None
        if supported and not special:
            return expert_choice.choose_experts(logits, expert_bias, topk, scaling_factor or 1.0)
        return upstreams(
            logits,
            topk,
            use_pre_softmax,
            num_groups,
            group_topk,
            scaling_factor,
            score_function,
            expert_bias,
            fused,
            router_replay,
            dense_output,
            precomputed_indices,
        )

    return topk_routing


TABLE = Table(
    "experts",
    (
        Patch(
            DISPATCHER,
            "permute",
            permute_in_one_pass,
            "tokens are sorted and copied by many operations, and their gradients summed by atomics",
            f"{UTILS}:337",
        ),
        Patch(
            DISPATCHER,
            "unpermute",
            unpermute_in_one_pass,
            "rows of a token are summed by atomics in bf16",
            f"{UTILS}:470",
        ),
        Patch(
            DISPATCHER,
            "sort_chunks_by_idxs",
            leave_sorted_chunks,
            "all tokens are copied where they are in order",
            f"{UTILS}:572",
        ),
        Patch(
            f"{DISPATCHER}:MoEAlltoAllTokenDispatcher",
            "_maybe_dtoh_and_synchronize",
            keep_counts_on_device,
            "the host waits for the device in each layer",
            "core/transformer/moe/token_dispatcher.py:913",
        ),
        Patch(
            "megatron.core.transformer.moe.router",
            "router_gating_linear",
            multiply_in_bf16,
            "all tokens are copied to fp32 in each pass",
            f"{UTILS}:1377",
        ),
        Patch(
            "megatron.core.transformer.moe.router",
            "topk_routing_with_score_function",
            choose_in_one_kernel,
            "many small operations, and a sort of each token's scores",
            f"{UTILS}:710",
        ),
    ),
)
