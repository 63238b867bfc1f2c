"""Patches for collectives that Gloo does not have, on the CPU engine."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.patches.patching import Patch, Table

MAPPINGS = "megatron.core.tensor_parallel.mappings"


def give_all_to_all_its_splits(there: Callable) -> Callable:
    """Turns the MoE dispatcher's splits into arrays on the CPU too.

    Upstream converts them only ``if tensor.is_cuda``; Gloo's ``all_to_all_single`` wants lists.
    """

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def gather_unequal_parts(gather: Callable) -> Callable:
    """Gathers parts of unequal length by an all-reduce of the whole.

    Expert tensor parallelism with expert parallelism has such; NCCL can, Gloo refuses.
    """

    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        whole = input_.new_zeros(sum(output_split_sizes), *input_.shape[1:])
        whole.split(output_split_sizes)[group.rank()].copy_(input_)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    return gather_along_first_dim


def reduce_scatter_unequal_parts(reduce_scatter: Callable) -> Callable:
    """Reduces and scatters parts of unequal length by an all-reduce of the whole."""

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter_along_first_dim


GLOO = Table(
    "collectives over Gloo",
    (
        Patch(
            "megatron.core.transformer.moe.token_dispatcher",
            "maybe_move_tensor_to_cpu",
            give_all_to_all_its_splits,
            "splits of tensors on the CPU stay tensors, and Gloo wants lists",
            "core/transformer/moe/moe_utils.py:1184",
        ),
        Patch(
            MAPPINGS,
            "_gather_along_first_dim",
            gather_unequal_parts,
            "Gloo gathers parts of one length alone",
            "core/tensor_parallel/mappings.py:118",
        ),
        Patch(
            MAPPINGS,
            "_reduce_scatter_along_first_dim",
            reduce_scatter_unequal_parts,
            "Gloo scatters parts of one length alone",
            "core/tensor_parallel/mappings.py:159",
        ),
    ),
)
