"""The layer around a Mamba-2 mixer: norm, mixer, residual connection.

Shape letters: t tokens of the hidden state on a rank, b samples of a micro-batch, h hidden size.
"""

from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor


class ResidualMambaLayer(MambaLayer):
    """Upstream's layer (core/ssm/mamba_layer.py:112), which also takes its residual from the norm.

    See :class:`megatron_hybrid.layers.norm.InputRMSNorm`; upstream's layers with attention do so already.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[t, b, h] to [t, b, h]; the mask and the rotary table are not used."""
        normed = self.norm(hidden_states.to(self.config.params_dtype))
        normed, residual = normed if isinstance(normed, tuple) else (normed, hidden_states)
        if self.config.fp32_residual_connection:
            residual = residual.float()
        context = inference_context if inference_params is None else inference_params
        mixed = self.mixer(normed, inference_context=context, packed_seq_params=packed_seq_params)
        with self.bias_dropout_add_exec_handler():
            add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
            return add(mixed, residual, self.hidden_dropout)
