"""Upstream's mixture of experts; on the torch backend with two grouped products in place of two for each expert."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.layers.spec import Build

ALIGNMENT = 8
"""Numbers of bf16 in the 16 bytes of which grouped products want every row to be a multiple."""


def spec(symbol: str, build: Build) -> ModuleSpec:
    """``E``."""
    parts = build.parts
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.norm, mlp=parts.moe, mlp_bda=get_bias_dropout_add
        ),
    )


def can_group(config: Any, tokens: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the experts' products can be grouped ones; upstream's loop over the experts does the rest.

    Args:
        config: The experts' TransformerConfig.
        tokens: [n, h], ordered by expert.
        weights: One expert's, [out, in]; the others have the same shapes.
    """
    return (
        tokens.is_cuda
        and torch.cuda.get_device_capability(tokens.device) >= (9, 0)  # torch loops itself on older GPUs
        and all(t.dtype == torch.bfloat16 for t in (tokens, *weights))
        and all(size % ALIGNMENT == 0 for weight in weights for size in weight.shape)
        and len(tokens) > 0
        # Biases, scaled tokens, quantized and sharded weights: upstream knows what to do with each
        and not (config.add_bias_linear or config.moe_apply_probs_on_input or config.fp8 or config.fp4)
        and config.expert_gtp_weight_remat_size == 1
    )


class GroupedProduct(torch.autograd.Function):
    """``x_e @ weight_e.T`` for the rows of each expert e.

    The weights are stacked again in the backward pass: kept, the stack would be a second copy of all experts of the
    model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        """``x`` [n, in], ``ends`` [E] int32 (the row behind each expert's last), E weights [out, in] -> [n, out]."""
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of each weight; zeros for an expert without tokens."""
        x, ends, *weights = ctx.saved_tensors
        dy = dy.contiguous()
        dx = F.grouped_mm(dy, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        wanted = any(ctx.needs_input_grad[2:])
        dw = F.grouped_mm(dy.t(), x, offs=ends).unbind() if wanted else (None,) * len(weights)
        return dx, None, *dw


class GroupedLinears(torch.nn.Module):
    """Linears of equal shapes, one for each expert, as the one linear that MLP.forward calls."""

    def __init__(self, linears: Sequence[torch.nn.Module], ends: Tensor):
        super().__init__()
        self.ends = ends
        # A tuple: the linears stay the experts' submodules alone
        self.linears = tuple(linears)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[n, in] -> [n, out], and no bias."""
        for linear in self.linears:
            # Upstream's DDP waits here for weights that are still being gathered (--overlap-param-gather)
            for hook in linear._forward_pre_hooks.values():
                hook(linear, (x,))
        return GroupedProduct.apply(x, self.ends, *(linear.weight for linear in self.linears)), None


class GroupedExperts(SequentialMLP):
    """SequentialMLP (core/transformer/moe/experts.py:1260) with the same parameters, checkpoints and results."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[n, h] ordered by local expert, [local experts] counts, [n] routing probabilities -> [n, h], bias or None."""
        experts, tokens = self.local_experts, permuted_local_hidden_states
        weights = experts[0].linear_fc1.weight, experts[0].linear_fc2.weight
        if len(experts) == 1 or not can_group(self.config, tokens, weights):
            return super().forward(tokens, tokens_per_expert, permuted_probs)
        ends = tokens_per_expert.cumsum(0).to(tokens.device, torch.int32)
        # Upstream's own forward, and so its own activations, over the tokens of all experts at once
        mlp = SimpleNamespace(
            config=experts[0].config,
            activation_func=experts[0].activation_func,
            linear_fc1=GroupedLinears([e.linear_fc1 for e in experts], ends),
            linear_fc2=GroupedLinears([e.linear_fc2 for e in experts], ends),
        )
        return MLP.forward(mlp, tokens, permuted_probs)
