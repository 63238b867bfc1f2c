"""How a model is spread over ranks: the sizes of the groups, and the batch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_hybrid.accounting.sizes import Sizes, setting


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel layout of a run and its batch. Sizes of groups are numbers of ranks."""

    tp: int = 1
    """Tensor parallelism."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Segments (virtual stages) of each pipeline stage."""
    cp: int = 1
    """Context parallelism."""
    ep: int = 1
    """Expert parallelism."""
    etp: int = 1
    """Tensor parallelism of the experts."""
    dp: int = 1
    """Data parallelism: replicas of the model."""
    sequence_parallel: bool = False
    micro_batch: int = 1
    """Samples."""
    global_batch: int = 1
    """Samples."""

    @classmethod
    def from_args(cls, args: Any) -> "Layout":
        """The layout of Megatron's arguments; absent ones have Megatron's default.

        Raises:
            ValueError: The processes do not divide into model replicas, or the batch into micro-batches.
        """

        get = partial(setting, args)
        tp, pp, cp = (get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "pipeline_model", "context"))
        world = get("world_size", tp * pp * cp)
        if world % (tp * pp * cp):
            raise ValueError(
                f"{world} processes do not divide into model replicas of tensor {tp} x pipeline {pp} x context {cp}."
            )
        dp, micro = world // (tp * pp * cp), get("micro_batch_size", 1)
        segments = (get("hybrid_layer_pattern", "").partition("/")[0].count("|") + 1) // pp
        result = cls(
            tp=tp,
            pp=pp,
            vpp=max(1, segments),
            cp=cp,
            ep=get("expert_model_parallel_size", 1),
            etp=get("expert_tensor_parallel_size", tp),
            dp=dp,
            sequence_parallel=bool(get("sequence_parallel", False)) and tp > 1,
            micro_batch=micro,
            global_batch=get("global_batch_size", micro * dp),
        )
        if result.global_batch % (micro * dp):
            raise ValueError(
                f"--global-batch-size {result.global_batch} is no multiple of --micro-batch-size {micro} times {dp} "
                "model replicas: change one of them, or the number of processes."
            )
        return result

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert."""
        return self.world // (self.ep * self.etp * self.pp)

    @property
    def micro_batches(self) -> int:
        """Of each model replica in a step."""
        return self.global_batch // (self.micro_batch * self.dp)

    def tokens(self, seq_length: int) -> int:
        """Of one micro-batch on one rank of the context-parallel group, before sequence parallelism divides them."""
        return self.micro_batch * seq_length // self.cp

    def shard(self, sizes: Sizes) -> Sizes:
        """The sizes of one rank's share of each layer."""
        return sizes.shard(self.tp, self.ep, self.etp)
