"""Upstream's mixture of experts; on the torch backend all experts at once instead of a loop over modules.

How tokens come to their experts, and the router's product, are upstream's with the functions of patches/experts.py.

Shape letters, all of one rank: n tokens routed to its experts, E its experts, in and out channels of a linear, h hidden
size.
"""

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

from megatron_hybrid.kernels.expert_ffn import Grouped, OneByOne, expert_ffn
from megatron_hybrid.layers.spec import Build

ALIGNMENT = 8
"""Elements of bf16 in 16 bytes: grouped products need rows of a multiple of 16 bytes."""
ROWS_FOR_OWN_PRODUCT = 512
"""Tokens of an expert, on average, from which its own product fills a GPU and is worth a wait for their number."""


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``E``."""
    parts = build.parts
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.norm, mlp=parts.moe, mlp_bda=get_bias_dropout_add
        ),
    )


def can_group(config: Any, tokens: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether grouped products support this case; all others take upstream's loop over the experts.

    Args:
        config: The experts' TransformerConfig.
        tokens: [n, h], ordered by expert.
        weights: Weights of one expert, [out, in] each; those of the others have the same shapes.
    """
    return (
        tokens.is_cuda
        and torch.cuda.get_device_capability(tokens.device) >= (9, 0)  # on older GPUs torch itself loops
        and all(t.dtype == torch.bfloat16 for t in (tokens, *weights))
        and all(size % ALIGNMENT == 0 for weight in weights for size in weight.shape)
        and len(tokens) > 0
        # Upstream's loop supports biases, scaled tokens, quantized and sharded weights.
        and not (config.add_bias_linear or config.moe_apply_probs_on_input or config.fp8 or config.fp4)
        and config.expert_gtp_weight_remat_size == 1
    )


class GroupedProduct(torch.autograd.Function):
    """``x_e @ weight_e.T`` for the rows of each expert e.

    The backward pass stacks the weights again: saved stacks would be a second copy of all experts of the model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        """x [n, in], ends [E] int32 (the row after each expert's last), E weights [out, in] to [n, out]."""
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)  # [n, in] x [E, in, out]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [n, out] to the gradients of x [n, in] and each weight [out, in]; zeros for experts without tokens."""
        x, ends, *weights = ctx.saved_tensors
        dy = dy.contiguous()
        # [n, out] x [E, out, in] to [n, in]; [out, n] x [n, in] to [E, out, in]
        dx = F.grouped_mm(dy, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        wanted = any(ctx.needs_input_grad[2:])
        dw = F.grouped_mm(dy.t(), x, offs=ends).unbind() if wanted else (None,) * len(weights)
        return dx, None, *dw


def wait_for_weights(linears: Sequence[torch.nn.Module], x: Tensor) -> None:
    """Calls what DDP hooks before each linear: there it waits for weights that are still being gathered
    (``--overlap-param-gather``)."""
    for linear in linears:
        for hook in linear._forward_pre_hooks.values():
            hook(linear, (x,))


class GroupedLinears(torch.nn.Module):
    """The experts' linears, all of one shape, behind the interface of the one linear that MLP.forward calls."""

    def __init__(self, linears: Sequence[torch.nn.Module], ends: Tensor):
        super().__init__()
        self.ends = ends
        # A tuple, so that they are not registered as submodules a second time.
        self.linears = tuple(linears)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[n, in] to ([n, out], None)."""
        wait_for_weights(self.linears, x)
        return GroupedProduct.apply(x, self.ends, *(linear.weight for linear in self.linears)), None


def is_swiglu(config: Any) -> bool:
    """Whether the activation is SwiGLU as :func:`expert_ffn` computes it (core/transformer/mlp.py:236)."""
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
        and not config.activation_func_fp8_input_store
        and not config.use_te_activation_func
    )


def products_for(tokens_per_expert: Tensor, tokens: Tensor) -> Grouped | OneByOne:
    """How the products of these experts are done.

    Args:
        tokens_per_expert: Counts [E], anywhere.
        tokens: [n, h], ordered by expert.
    """
    capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
    if len(tokens) >= ROWS_FOR_OWN_PRODUCT * len(tokens_per_expert) and not capturing:
        return OneByOne(tokens_per_expert.tolist())  # of counts on the device: patches/experts.py, CountsOnHost
    return Grouped(tokens_per_expert.cumsum(0).to(tokens.device, torch.int32, non_blocking=True))


class GroupedExperts(SequentialMLP):
    """SequentialMLP (core/transformer/moe/experts.py:1260) on the products of all experts, where :func:`can_group`.

    Parameters, checkpoints and results are the same. Gradients of the loop's linears are not accumulated inside their
    products: one step may take both ways, and upstream leaves out the gradient of a weight whose other product
    accumulates (core/distributed/distributed_data_parallel.py:490). So it does where :func:`expert_ffn` accumulates in
    one micro-batch and a rank has no tokens, and loops, in another one: that gradient is zero.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for expert in self.local_experts:
            expert.linear_fc1.gradient_accumulation_fusion = False
            expert.linear_fc2.gradient_accumulation_fusion = False

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [n, h] ordered by expert, counts [E], routing probabilities [n] to ([n, h], bias or None)."""
        experts, tokens = self.local_experts, permuted_local_hidden_states
        weights = experts[0].linear_fc1.weight, experts[0].linear_fc2.weight
        if len(experts) == 1 or not can_group(self.config, tokens, weights):
            return super().forward(tokens, tokens_per_expert, permuted_probs)
        first, second = [e.linear_fc1 for e in experts], [e.linear_fc2 for e in experts]
        if is_swiglu(self.config):
            wait_for_weights([*first, *second], tokens)
            weights = [linear.weight for linear in first], [linear.weight for linear in second]
            products = products_for(tokens_per_expert, tokens)
            return expert_ffn(
                tokens, permuted_probs, products, *weights, self.config.gradient_accumulation_fusion
            ), None
        ends = tokens_per_expert.cumsum(0).to(tokens.device, torch.int32)  # [E]
        # Upstream's forward, and with it every activation function, for the tokens of all experts at once.
        mlp = SimpleNamespace(
            config=experts[0].config,
            activation_func=experts[0].activation_func,
            linear_fc1=GroupedLinears(first, ends),
            linear_fc2=GroupedLinears(second, ends),
        )
        return MLP.forward(mlp, tokens, permuted_probs)
