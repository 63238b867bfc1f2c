"""The hybrid model with its output head and its loss as one function (:mod:`.kernels.linear_cross_entropy`).

Shape letters: s tokens of a sample on a context-parallel rank, b samples of a micro-batch, h hidden size, v entries of
the vocabulary on a tensor-parallel rank, d prediction heads; sequence parallelism divides s by tp ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.accounting.loss_chunks import chunk_tokens
from megatron_hybrid.kernels.linear_cross_entropy import linear_cross_entropy


class HybridLossModel(HybridModel):
    """Upstream's hybrid model, which asks its output layer for losses instead of logits where it is given labels.

    Forward pass, prediction heads and checkpoints are upstream's. ``fused_loss`` of the layer specs says whether the
    loss is computed without the logits; otherwise nothing differs.
    """

    def __init__(self, config: Any, hybrid_stack_spec: Any, *args: Any, **kwargs: Any):
        super().__init__(config, hybrid_stack_spec, *args, **kwargs)
        self._given: _Given | None = None
        layer: Any = getattr(self, "output_layer", None)
        if hybrid_stack_spec.submodules.fused_loss and layer is not None:
            self.output_layer = LossHead(layer)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream's (core/models/hybrid/hybrid_model.py:405): losses [b, s], logits without labels."""
        given = (input_ids, position_ids, attention_mask, decoder_input, labels, *args)
        with self._giving(labels, loss_mask):
            return super().forward(*given, loss_mask=loss_mask, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Any) -> Tensor:
        """Labels [b, s] and logits [s, b, v], or what :class:`LossHead` has in their place, to losses [b, s]."""
        if not isinstance(logits, Unprojected):
            return super().compute_language_model_loss(labels, logits)
        # prediction heads have labels of their own, and masks that are not given here: they compute their gradients
        # in the backward pass
        given = self._given
        mask = None if given is None or labels is not given.labels else given.mask
        losses = logits.losses(labels.t(), None if mask is None else mask.t())
        return losses.t().contiguous()

    @contextmanager
    def _giving(self, labels: Tensor | None, mask: Tensor | None) -> Iterator[None]:
        head = getattr(self, "output_layer", None)
        if labels is None or not isinstance(head, LossHead):
            yield
            return
        self._given, head.projects = _Given(labels, mask), False
        try:
            yield
        finally:
            self._given, head.projects = None, True


class _Given(NamedTuple):
    labels: Tensor
    mask: Tensor | None


class LossHead(ColumnParallelLinear):
    """An output layer that leaves the product with its weight to the loss, as long as ``projects`` is False.

    It is called in either case, so that what hooks into its call is done: the weight is gathered there under
    ``--overlap-param-gather`` (core/distributed/distributed_data_parallel.py).
    """

    def __init__(self, layer: ColumnParallelLinear):
        """Takes the place of a layer, with its weight."""
        super().__init__(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=lambda weight: None,
            bias=False,
            gather_output=layer.gather_output,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        self.weight = layer.weight
        self.projects = True

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, None]:
        """As the layer's, [s, b, h] to [s, b, v]; or :class:`Unprojected` in place of the logits."""
        if self.projects:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        total = getattr(weight, "main_grad", None) if self.gradient_accumulation_fusion else None
        if total is not None and total.dtype == torch.float32:
            weight = _GradientElsewhere.apply(weight)
        else:
            total = None
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return Unprojected(hidden, weight, total, self.tp_group), None


class _GradientElsewhere(torch.autograd.Function):
    """A weight whose gradient is added to ``main_grad`` by the function that takes it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: None) -> Tensor | None:
        """What the parameter's hook wants to see (core/distributed/distributed_data_parallel.py:490).

        That is a tensor that it does not read, or nothing where the embedding has a gradient for it.
        """
        ctx.weight.grad_added_to_main_grad = True
        return None if getattr(ctx.weight, "zero_out_wgrad", False) else torch.empty_like(ctx.weight)


class Unprojected:
    """Logits [s, b, v] that are not there: what they are made of, and their maxima once there are losses.

    Upstream asks logits of prediction heads for nothing else (core/transformer/multi_token_prediction.py:493, :544).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, total: Tensor | None, group: Any):
        """total: fp32 [v, h] to which the weight's gradient is added, if it is not to be the weight's own."""
        self.hidden, self.weight, self._total, self._group = hidden, weight, total, group
        self._best: tuple[Tensor, Tensor] | None = None

    def losses(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Labels and mask [s, b] to losses [s, b], whose gradients are computed here if there is a mask."""
        s, b, h = self.hidden.shape
        chunk = chunk_tokens(s * b, self.weight.shape[0], self.weight.element_size())
        losses, top, column = linear_cross_entropy(
            self.hidden.reshape(s * b, h),
            self.weight,
            labels.reshape(-1),
            None if mask is None else mask.reshape(-1),
            self._group,
            chunk=chunk,
            best=mask is None,
            total=self._total,
        )
        if top is not None and column is not None:
            self._best = top.view(s, b), column.view(s, b)
        return losses.view(s, b)

    def max(self, dim: int) -> tuple[Tensor, Tensor]:
        """The largest logit of each token on this rank, and where it is in the rank's slice, [s, b] each."""
        if self._best is None:
            raise RuntimeError("the largest logits are known after the losses without a mask")
        return self._best

    def size(self, dim: int) -> int:
        """v, for the last dimension."""
        return (*self.hidden.shape[:-1], self.weight.shape[0])[dim]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.argmax:
            return args[0].max(-1)[1]
        return NotImplemented
