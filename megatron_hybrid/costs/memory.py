"""Memory of one rank for parameters, gradients and optimizer state, in bytes.

Exactly what stays allocated from step to step; 8-bit copies of weights (``--fp8-format``) are among the parameters, and
are derived from Transformer Engine's code. Not counted: buffers of the model (the router's expert bias, its counts
of tokens), activations, and what lives within a step - above all fp32 copies of the gradients during the optimizer's
step where gradients are kept in 16 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.accounting.tensors import Tensor, norm_sizes, weights
from megatron_hybrid.costs.buffers import Buffer, plain_buffer, sharded_buffer
from megatron_hybrid.costs.parameters import layer_tensors, mtp_weights
from megatron_hybrid.costs.stages import stages
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern


@dataclass(frozen=True)
class ModelStates:
    """Bytes."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Main parameters, where they are a copy, and moments."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: "ModelStates") -> "ModelStates":
        return ModelStates(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


@dataclass(frozen=True)
class RankMemory(ModelStates):
    """What one rank holds, in bytes: parameters, gradients, optimizer state and their total."""

    stage: int = 0
    """Pipeline stage."""
    rank: int = 0
    """Among the ranks of the stage."""
    experts: ModelStates = ModelStates()
    """The part of routed experts where they are laid out otherwise than the rest (expert parallelism, or tensor
    parallelism of their own), and so have buffers of their own; else it is zero."""

    @property
    def dense(self) -> ModelStates:
        """All but ``experts``."""
        e = self.experts
        return ModelStates(self.parameters - e.parameters, self.gradients - e.gradients, self.optimizer - e.optimizer)


class StageParameters(NamedTuple):
    """Parameters on one rank of a pipeline stage."""

    dense: int
    experts: int
    """Routed."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


# Parameters --------------------------------------------------------------------------------------


def stage_tensors(pattern: Pattern, sizes: Sizes, layout: Layout, stage: int) -> list[list[Tensor]]:
    """The parameters of each model chunk (segment) of one rank, in the order of the model.

    Source: ``core/models/hybrid/hybrid_model.py:215-340``. The first chunk of the model has the embedding, the last one
    the output layer. Where this is not the same chunk, a tied output layer is a second copy of the embedding. A last
    chunk with MTP heads has a copy of the embedding for these, tied or not; tied, it is the output layer, too
    (``patches/building.tie_output_layers_of_heads``).

    Raises:
        ValueError: The pattern does not divide over the stages.
    """
    held = stages(pattern, layout.pp)[stage]
    chunks = []
    for i, layers in enumerate(held.segments):
        first, last = held.first and i == 0, held.last and i == len(held.segments) - 1
        chunks.append(_chunk_tensors(pattern, layers, sizes, layout, first, last))
    return chunks


def _chunk_tensors(
    pattern: Pattern, layers: str, sizes: Sizes, layout: Layout, first: bool, last: bool
) -> list[Tensor]:
    known = {s: layer_tensors(s, sizes, layout.tp, layout.ep, layout.etp) for s in set(layers + pattern.mtp)}
    embedding = Tensor(layout.shard(sizes).padded_vocab * sizes.hidden)
    # Stages with copies of one embedding sum its gradient; core/models/common/language_module/language_module.py:252
    heads = bool(pattern.mtp_depths)
    copy = embedding._replace(own_bucket=layout.pp > 1 and (sizes.tied or heads))
    tensors = [copy] if first or last and heads else []
    for symbol in layers:
        tensors += known[symbol]
    if last:
        tensors += _norm_tensors(sizes)
        for _ in range(mtp_weights(pattern, sizes)):
            # [state; token] -> state is cut by rows
            tensors += [*_norm_tensors(sizes) * 2, Tensor(2 * sizes.hidden * sizes.hidden // layout.tp)]
            for symbol in pattern.mtp:
                tensors += known[symbol]
            tensors += _norm_tensors(sizes)
        if not sizes.tied:
            tensors.append(embedding)
        elif not (first or heads):
            tensors.append(copy)
    return tensors


def _norm_tensors(sizes: Sizes) -> list[Tensor]:
    return [Tensor(size) for size in norm_sizes(sizes)]


def stage_parameters(pattern: Pattern, sizes: Sizes, layout: Layout, stage: int) -> StageParameters:
    """Parameters on one rank of a pipeline stage; all ranks of a stage have equally many.

    Raises:
        ValueError: The pattern does not divide over the stages.
    """
    tensors = [t for chunk in stage_tensors(pattern, sizes, layout, stage) for t in chunk]
    experts = sum(t.size for t in tensors if t.expert)
    return StageParameters(sum(t.size for t in tensors) - experts, experts)


def eight_bit_weights(pattern: Pattern, sizes: Sizes, layout: Layout, stage: int) -> int:
    """Elements of weights on one rank of a pipeline stage whose products ``--fp8-format`` runs in 8 bits.

    Raises:
        ValueError: The pattern does not divide over the stages, or a layer does not say which of its products do.
    """
    held, local = stages(pattern, layout.pp)[stage], layout.shard(sizes)
    heads = mtp_weights(pattern, sizes) if held.last else 0
    layers = held.layers + pattern.mtp * heads
    joins = heads * 2 * sizes.hidden * sizes.hidden // layout.tp  # [state; token] -> state
    return joins + sum(weights(account(symbol).eight_bit_linears(sizes, local, layout.tp)) for symbol in layers)


# Bytes -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def rank_memory(
    pattern: Pattern, sizes: Sizes, layout: Layout, storage: Storage, stage: int, rank: int | None = None
) -> RankMemory:
    """Bytes of parameters, gradients and optimizer state on one rank.

    Args:
        sizes: Of the whole model.
        stage: Pipeline stage.
        rank: Among the ranks of the stage (tensor-parallel ranks next to each other, then context-parallel ones, then
            replicas); None: one that holds the most.

    Raises:
        ValueError: The pattern does not divide over the stages, or the replicas over the optimizer's instances.
    """
    kinds = stage_buffers(stage_tensors(pattern, sizes, layout, stage), layout, storage, stage)
    ranks = range(layout.world // layout.pp) if rank is None else [rank]
    # Shards go to replicas in their order: a rank has one of the dense parameters' and one of the experts'.
    strides = (layout.tp, layout.etp * layout.ep)
    states = [_states(buffers, storage) for buffers in kinds]
    held = {r: [of[r // stride % len(of)] for of, stride in zip(states, strides, strict=True)] for r in ranks}
    rank, (dense, experts) = max(held.items(), key=lambda item: sum(part.total for part in item[1]))
    both = dense + experts
    copies = storage.eight_bit * eight_bit_weights(pattern, sizes, layout, stage) if storage.eight_bit else 0
    return RankMemory(both.parameters + copies, both.gradients, both.optimizer, stage, rank, experts)


def largest_rank(pattern: Pattern, sizes: Sizes, layout: Layout, storage: Storage) -> RankMemory:
    """The rank with the most bytes of parameters, gradients and optimizer state.

    Raises:
        ValueError: The pattern does not divide over the stages.
    """
    found = (rank_memory(pattern, sizes, layout, storage, stage) for stage in range(layout.pp))
    return max(found, key=lambda memory: memory.total)


def stage_buffers(
    chunks: list[list[Tensor]], layout: Layout, storage: Storage, stage: int
) -> tuple[list[Buffer], list[Buffer]]:
    """Buffers of dense parameters and of experts, of all chunks of a stage.

    Experts have buffers of their own, with other replicas, where they are spread otherwise than the rest
    (``core/tensor_parallel/layers.py:961``, ``core/distributed/param_and_grad_buffer.py:882``). Only the first chunk of
    the first stage is cut into buckets (``training/training.py:1857``).

    Raises:
        ValueError: The replicas do not divide over the instances of the distributed optimizer.
    """
    apart = layout.ep > 1 or layout.etp != layout.tp
    elements = sum(t.size for chunk in chunks for t in chunk)
    dense: list[Buffer] = []
    experts: list[Buffer] = []
    for i, chunk in enumerate(chunks):
        bucket_size = storage.bucket_elements(layout, elements) if stage == i == 0 else None
        for buffers, tensors, replicas in (
            (dense, [t for t in chunk if not (apart and t.expert)], layout.cp * layout.dp),
            (experts, [t for t in chunk if apart and t.expert], layout.expert_dp),
        ):
            if tensors and storage.distributed:
                shards, left = divmod(replicas, storage.optimizer_instances)
                if left or not shards:
                    raise ValueError(
                        f"{replicas} replicas do not divide into --num-distributed-optimizer-instances "
                        f"{storage.optimizer_instances}: change one of them, or the parallel sizes."
                    )
                buffers.append(sharded_buffer(tensors, shards, bucket_size, storage.pads_for_bandwidth))
            elif tensors:
                buffers.append(plain_buffer(tensors))
    return dense, experts


def _states(buffers: Sequence[Buffer], storage: Storage) -> list[ModelStates]:
    """What the ranks of a group of replicas hold of buffers, by shard."""
    elements = sum(buffer.size for buffer in buffers)
    owned = [sum(shares) for shares in zip(*(buffer.owned for buffer in buffers), strict=True)] or [0]
    return [
        ModelStates(elements * storage.parameter, elements * storage.gradient, mine * storage.optimizer)
        for mine in owned
    ]
