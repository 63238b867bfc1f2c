"""Weights made of named parts: how tensor-parallel ranks share and store them.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, o rows of a projection. One rank's share
is marked: o/tp rows (the sum of its parts' ``local_rows``), s/cp tokens. t is the number of tokens of the hidden state
on a rank: s/cp, or s/(cp tp) under sequence parallelism.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_hybrid.accounting.projection import Part
from megatron_hybrid.layers.aligned_linear import AlignedColumnLinear


def shared_by_ranks(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a parameter that is equal on all tensor-parallel ranks, of whose gradient each rank computes a part.

    The parts are summed once a step, with and without sequence parallelism (patches/building.py,
    ``sum_shared_gradients``). In the gradient norm the parameter counts once, because it is not split
    (core/tensor_parallel/layers.py:95).
    """
    parameter.sequence_parallel = True
    return parameter


class SharedRowsLinear(AlignedColumnLinear):
    """Column-parallel linear without bias; several ranks may share some of its rows.

    Parts with fewer units than ranks (B and C of few groups, few key heads, a gate for each token) cannot be split.
    Their rows are a second parameter, equal on every rank, of which a rank uses its units. Both parameters go through
    one matrix product and one gather of the input. For that, each forward pass concatenates the weight: a copy that
    autograd keeps until the backward pass.

    Args:
        input_size: h.
        output_size: Rows that all ranks compute together; a shared row counts once for each rank.
        parts: All rows, in the order of the output.

    The other arguments are upstream's.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parts: list[Part],
        config: TransformerConfig,
        init_method: Any,
        tp_group: Any,
        **kwargs: Any,
    ):
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            tp_group=tp_group,
            skip_weight_param_allocation=True,
            **kwargs,
        )
        # Its gradient is that of many parts, of which each would be a narrow product of its own.
        self.gradient_accumulation_fusion = False
        self.parts = parts
        self.tp, self.tp_rank = tp_group.size(), tp_group.rank()
        self.split_parts = [p for p in parts if not p.is_shared(self.tp)]
        self.shared_parts = [p for p in parts if p.is_shared(self.tp)]
        if sum(p.local_rows(self.tp) for p in parts) != self.output_size_per_partition:
            raise ValueError(f"output_size {output_size} on {self.tp} ranks is not the number of rows of {parts}")

        def empty(rows: int) -> nn.Parameter:
            device = torch.cuda.current_device()
            return nn.Parameter(torch.empty(rows, input_size, dtype=config.params_dtype, device=device))

        self.weight = empty(sum(p.local_rows(self.tp) for p in self.split_parts))  # [rows/tp, h]
        self.shared_rows = shared_by_ranks(empty(sum(p.rows for p in self.shared_parts)))  # [shared rows, h]
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                init_method(self.weight)
            init_method(self.shared_rows)  # on the random stream that is the same on all tensor-parallel ranks

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """[t, b, h] to ([s/cp, b, o/tp], None)."""
        split = iter(self.weight.split([p.local_rows(self.tp) for p in self.split_parts]))
        shared = iter(self.shared_rows.split([p.rows for p in self.shared_parts]))
        pieces = []
        for part in self.parts:
            if part.is_shared(self.tp):
                pieces.append(next(shared).narrow(0, part.start(self.tp, self.tp_rank), part.local_rows(self.tp)))
            else:
                pieces.append(next(split))
        return super().forward(input_, torch.cat(pieces))  # weight [o/tp, h]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Keys and shapes, part by part, are those of a linear without shared rows."""
        result = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        store_by_parts(result, f"{prefix}weight", {p.name: p.local_rows(self.tp) for p in self.split_parts})
        store_by_parts(
            result, f"{prefix}shared_rows", {p.name: p.rows for p in self.shared_parts}, stored_as=f"{prefix}weight"
        )
        return result


def store_children(module: nn.Module, prefix: str, sharded_offsets: tuple, metadata: Any, tp_group: Any) -> dict:
    """The sharded state of a mixer's submodules, each under its own name.

    Args:
        module: The mixer.
        prefix, sharded_offsets, metadata: As of ``sharded_state_dict``; the metadata with its data-parallel group.
        tp_group: Of the mixer.
    """
    result: dict = {}
    for name, child in module.named_children():
        result |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
    return result


def store_by_parts(state: dict, key: str, parts: dict[str, int], dim: int = 0, stored_as: str | None = None) -> None:
    """Replaces the sharded tensor ``state[key]`` by one for each of its parts, so that it loads at any layout.

    Args:
        state: A sharded state dict.
        key: Key of the tensor.
        parts: Name of each part to its local length along ``dim``.
        dim: The dimension along which the parts are concatenated.
        stored_as: Key in the checkpoint, before the name of the part; default: the tensor's own.
    """
    factory = _split_tensor_factory(state[key], list(parts.values()), list(parts), dim)
    # upstream's factory merges along the first dimension, whichever it split
    state[key] = replace(factory, key=stored_as or factory.key, merge_fn=partial(torch.cat, dim=dim))
