"""RMSNorm: of the hidden state for the torch backend, and over groups of channels that ranks may share."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32, returned in the weight's dtype.

    That is the input's but for ``--fp32-residual-connection``, where the linear behind it takes the parameters' dtype.

    Upstream's torch norm refuses sequence parallelism (core/transformer/torch_norm.py:48). All that it takes is
    to mark the weight, so that its gradient is summed over the tensor-parallel ranks
    (core/distributed/finalize_model_grads.py).

    Args:
        config: Decides the dtype and whether the weight is marked.
        hidden_size: Length of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        weight = self.weight.to(x.dtype)  # torch's fused kernel wants one dtype
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)


class StandaloneRMSNorm(RMSNorm):
    """RMSNorm that is no linear's input norm, with the empty extra state that such norms have in Transformer Engine.

    Loading asks for every key of the model: without this one, checkpoints of the torch backend would not load
    into Transformer Engine's. Upstream's torch linears do the same (core/tensor_parallel/layers.py:1232).
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def group_rms_normalise(xs: list[Tensor], groups: list[int], eps: float, tp_group: Any) -> list[Tensor]:
    """Divides channels by the root mean square of their group, without a weight.

    A group is the same channels whatever the tensor-parallel size. Where it spans ranks, the sums of squares of all
    inputs are added over the ranks in one all-reduce of fp32 [s, b, sum(groups)], and so is their gradient.

    Args:
        xs: Tensors [s, b, w / tp].
        groups: For each, groups that its w channels fall into; a multiple or a divisor of the number of ranks.
        eps: Added to the mean square.
        tp_group: Ranks that hold the other channels.

    Returns:
        The tensors, normalised in fp32, in their own dtypes.
    """
    tp, rank = tp_group.size(), tp_group.rank()
    if all(n % tp == 0 for n in groups):
        heads = [x.unflatten(-1, (n // tp, -1)) for x, n in zip(xs, groups, strict=True)]
        return [nn.functional.rms_norm(h, h.shape[-1:], eps=eps).flatten(-2) for h in heads]
    sums, sizes, places = [], [], []
    for x, n in zip(xs, groups, strict=True):
        local = max(1, n // tp)
        squares = x.float().square().unflatten(-1, (local, -1)).sum(-1)
        first = rank * n // tp
        sums.append(nn.functional.pad(squares, (first, n - first - local)))
        sizes.append(x.shape[-1] * tp // n)
        places.append((first, local))
    summed = reduce_from_tensor_model_parallel_region(torch.cat(sums, -1), group=tp_group)
    summed = copy_to_tensor_model_parallel_region(summed, group=tp_group)  # for its backward pass
    result = []
    for x, total, size, (first, local) in zip(xs, summed.split(groups, -1), sizes, places, strict=True):
        scale = (total.narrow(-1, first, local) / size + eps).rsqrt()
        result.append((x.float().unflatten(-1, (local, -1)) * scale[..., None]).flatten(-2).to(x.dtype))
    return result


class SplitVector(nn.Module):
    """A learned vector over channels that are split over the tensor-parallel ranks, starting at one.

    It is read by a call: that is when Megatron waits for parameters that it gathers in the background.
    """

    def __init__(self, width_local: int, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(width_local, dtype=dtype, device=torch.cuda.current_device()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, *unused: Any) -> Tensor:
        """[width_local]."""
        return self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class SpanningRMSNorm(SplitVector):
    """RMSNorm over groups of channels that several tensor-parallel ranks share; see :func:`group_rms_normalise`."""

    def __init__(self, width_local: int, groups: int, eps: float, dtype: torch.dtype, tp_group: Any):
        super().__init__(width_local, dtype, tp_group)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, width_local] to the same shape."""
        (y,) = group_rms_normalise([x], [self.groups], self.eps, self.tp_group)
        return y * self.weight
