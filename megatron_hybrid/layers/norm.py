"""RMSNorm: of the hidden state for the torch backend, and over groups of channels that may span ranks.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, w channels of a branch or mixer. One
rank's share is marked: w/tp channels, s/cp tokens.
"""

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

from megatron_hybrid.kernels.norms import has_kernel, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, returned in the weight's dtype.

    The weight's dtype differs from the input's under ``--fp32-residual-connection``: the linear after the norm needs
    the dtype of the parameters.

    Upstream's torch norm does not support sequence parallelism (core/transformer/torch_norm.py:48). It needs only a
    mark on the weight, by which its gradient is summed over the tensor-parallel ranks
    (core/distributed/finalize_model_grads.py).

    Args:
        config: Its params_dtype is the weight's; its sequence_parallel marks the weight.
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

    def forward(self, x: Tensor) -> Any:
        """[..., h] to the same shape."""
        if has_kernel(x):
            return rms_norm(x, self.weight, self.eps, dtype=self.weight.dtype)[0]
        weight = self.weight.to(x.dtype)  # torch's fused kernel needs both in one dtype
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)


class InputRMSNorm(RMSNorm):
    """RMSNorm at the start of a layer, which on CUDA also hands the layer its residual.

    The gradient of the residual is then added in the norm's own kernel. Upstream's layers take such a pair, as that of
    Transformer Engine's fused norm (core/transformer/transformer_layer.py:642); ``ResidualMambaLayer`` does, too.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        # The residual in fp32 is not what the norm gets; and a norm that is recomputed frees what it has returned.
        recomputed = config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules
        self.returns_residual = not (config.fp32_residual_connection or recomputed)

    def forward(self, x: Tensor) -> Any:
        """[..., h] to the same shape, or to that and x."""
        if self.returns_residual and has_kernel(x):
            return rms_norm(x, self.weight, self.eps, dtype=self.weight.dtype)
        return super().forward(x)


class StandaloneRMSNorm(RMSNorm):
    """RMSNorm that is not followed by a linear, with the empty extra state that Transformer Engine gives such norms.

    Loading needs every key of the model: without this one, checkpoints of the torch backend would not load into models
    of Transformer Engine. Upstream's torch linears do the same (core/tensor_parallel/layers.py:1232).
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def group_rms_normalise(xs: list[Tensor], groups: list[int], eps: float, tp_group: Any) -> list[Tensor]:
    """Divides channels by the root mean square of their group, without a weight.

    A group has the same channels at any tensor-parallel size. Where groups span ranks, the sums of squares of all
    inputs are summed over the ranks in one all-reduce of fp32 [s/cp, b, sum(groups)], and so is their gradient.

    Args:
        xs: Tensors [s/cp, b, w/tp].
        groups: For each tensor, the number of groups of its w channels; a multiple or a divisor of the number of ranks.
        eps: Added to the mean square.
        tp_group: Ranks that hold the other channels.

    Returns:
        The tensors [s/cp, b, w/tp], normalised in fp32, in their own dtypes.
    """
    tp, rank = tp_group.size(), tp_group.rank()
    if all(n % tp == 0 for n in groups):
        split = [x.unflatten(-1, (n // tp, -1)) for x, n in zip(xs, groups, strict=True)]
        # split: [s/cp, b, groups/tp, w/groups]
        return [nn.functional.rms_norm(x, x.shape[-1:], eps=eps).flatten(-2) for x in split]
    sums, sizes, places = [], [], []
    for x, n in zip(xs, groups, strict=True):
        local = max(1, n // tp)  # groups of which this rank has channels
        squares = x.float().square().unflatten(-1, (local, -1)).sum(-1)  # [s/cp, b, local]
        first = rank * n // tp
        sums.append(nn.functional.pad(squares, (first, n - first - local)))  # [s/cp, b, groups], zero elsewhere
        sizes.append(x.shape[-1] * tp // n)
        places.append((first, local))
    summed = reduce_from_tensor_model_parallel_region(torch.cat(sums, -1), group=tp_group)  # [s/cp, b, sum(groups)]
    summed = copy_to_tensor_model_parallel_region(summed, group=tp_group)  # for its backward pass
    result = []
    for x, total, size, (first, local) in zip(xs, summed.split(groups, -1), sizes, places, strict=True):
        scale = (total.narrow(-1, first, local) / size + eps).rsqrt()  # [s/cp, b, local]
        result.append((x.float().unflatten(-1, (local, -1)) * scale[..., None]).flatten(-2).to(x.dtype))
    return result


class SplitVector(nn.Module):
    """A learned vector over channels that are split over the tensor-parallel ranks, initialised to one.

    Call the module to read it: Megatron's hooks then wait for parameters that are still being gathered.
    """

    def __init__(self, width_local: int, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(width_local, dtype=dtype, device=torch.cuda.current_device()))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, *unused: Any) -> Tensor:
        """The vector, [w/tp]."""
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
    """RMSNorm over groups of channels that may span tensor-parallel ranks; see :func:`group_rms_normalise`."""

    def __init__(self, width_local: int, groups: int, eps: float, dtype: torch.dtype, tp_group: Any):
        super().__init__(width_local, dtype, tp_group)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """[s/cp, b, w/tp] to the same shape."""
        (y,) = group_rms_normalise([x], [self.groups], self.eps, self.tp_group)
        return y * self.weight
