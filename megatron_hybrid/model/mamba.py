"""Upstream's Mamba-2 mixer, with its core recomputed in the backward pass if asked."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor


class HybridMambaMixer(MambaMixer):
    """``MambaMixer`` whose convolution, scan and norm can be recomputed.

    Upstream's list of selectively recomputed modules is closed and holds none of them.

    Args:
        recompute: Keep only the projected input for the backward pass, and run the core again there.
    """

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recompute = recompute

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """[s, b, (z x B C dt)_local] to [s, b, d_inner_local] (core/ssm/mamba_mixer.py:727)."""
        run = super()._ssm_training
        if not (self.recompute and self.training):
            return run(zxBCdt, packed_seq_params)
        return tensor_parallel.checkpoint(lambda x: run(x, packed_seq_params), False, zxBCdt)
