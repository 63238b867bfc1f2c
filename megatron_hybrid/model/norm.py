"""RMSNorm for the torch backend."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32, returned in the input's dtype.

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
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class StandaloneRMSNorm(RMSNorm):
    """RMSNorm that is no linear's input norm, with the empty extra state that such norms have in Transformer Engine.

    Loading asks for every key of the model: without this one, checkpoints of the torch backend would not load
    into Transformer Engine's. Upstream's torch linears do the same (core/tensor_parallel/layers.py:1232).
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass
