"""The stack of layers that a pattern describes.

Shape letters: b samples of a micro-batch, h hidden size, t tokens of the hidden state on a rank: s/cp of a sample's s
tokens, or s/(cp tp) under sequence parallelism.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import annotate_first_last_layer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_hybrid.layers.registry import LAYERS


@dataclass
class LayerSpecs:
    """What a stack is built from: one spec for each symbol, and the norm after the last layer."""

    layers: dict[str, ModuleSpec]
    """Symbol of the pattern to the spec of its layer: a ``TransformerLayer`` or a ``MambaLayer``."""

    final_norm: Any
    mtp_block_spec: ModuleSpec | None = None
    """Norms and projection of multi-token prediction (MTP); upstream's HybridModel reads the field by this name."""

    fused_loss: bool = False
    """Output head and loss are one function (:class:`megatron_hybrid.model.loss_head.HybridLossModel`)."""


class HybridLayerStack(HybridStack):
    """Upstream's ``HybridStack``, built from a table of symbols instead of its fixed if/elif.

    Only the construction differs (core/models/hybrid/hybrid_block.py:134-220). Forward, recomputation and the sharded
    state dict are upstream's, which dispatch on ``TransformerLayer`` or ``MambaLayer``. Under sequence parallelism the
    forward pass runs on the tensor-parallel random stream, as in ``TransformerBlock``
    (core/transformer/transformer_block.py). In ``HybridStack`` it does not: ranks that hold different tokens would
    draw the same dropout masks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSpecs,
        pre_process: bool = True,
        layer_type_list: list[str] | None = None,
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: Any = None,
        dtype: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ):
        MegatronModule.__init__(self, config=config)
        if pg_collection is None or layer_type_list is None:
            raise ValueError("HybridLayerStack needs pg_collection and layer_type_list; pass both")
        self.pre_process = pre_process
        self.post_layer_norm = post_layer_norm
        self.post_process = post_process
        self.is_mtp_layer = is_mtp_layer
        self.pg_collection = pg_collection
        self.pp_group = pg_collection.pp
        self.tp_group = pg_collection.tp
        self.input_tensor = None  # set by the pipeline schedule
        self.layer_type_list = layer_type_list
        self.layers = nn.ModuleList(
            self._build_layer(symbol, submodules, i, pp_layer_offset, name) for i, symbol in enumerate(layer_type_list)
        )
        if config.cuda_graph_impl == "local":
            annotate_first_last_layer(self.layers)
        self.num_layers_per_pipeline_rank = len(self.layers)
        if post_process and post_layer_norm:
            self.final_norm = submodules.final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[t, b, h] to the same shape (core/models/hybrid/hybrid_block.py:265)."""
        # MTP layers run on this random stream already (core/transformer/multi_token_prediction.py).
        own_stream = self.config.sequence_parallel and self.training and not self.is_mtp_layer
        with get_cuda_rng_tracker().fork() if own_stream else nullcontext():
            return super().forward(*args, **kwargs)

    def _build_layer(
        self, symbol: str, submodules: LayerSpecs, index: int, pp_layer_offset: int, name: str | None
    ) -> nn.Module:
        spec = submodules.layers.get(symbol)
        if spec is None:
            raise ValueError(f"Layer symbol {symbol!r} has no spec: the pattern of the run does not contain it.")
        kwargs: dict[str, Any] = {
            "config": self.config,
            "layer_number": index + 1 + pp_layer_offset,
            "pg_collection": self.pg_collection,
            "name": f"{name}.layers.{index}" if name else None,
        }
        if issubclass(spec.module, MambaLayer):
            kwargs["pp_layer_offset"] = pp_layer_offset
        else:
            kwargs["add_layer_offset"] = False  # layer_number counts the whole model already
            optional = {"pp_layer_offset": pp_layer_offset, "is_mtp_layer": self.is_mtp_layer}
            kwargs |= {argument: optional[argument] for argument in LAYERS[symbol].build_with}
        quantized: Any = nullcontext()
        if self.config.fp8:
            quantized = get_fp8_context(self.config, index + pp_layer_offset, is_init=True)
        elif self.config.fp4:
            quantized = get_fp4_context(self.config, index + pp_layer_offset, is_init=True)
        with quantized:
            return build_module(spec, **kwargs)
