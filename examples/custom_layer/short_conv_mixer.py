"""The module of the gated short convolution.

Shapes: s sequence (whole, after the sequence-parallel gather), b batch, h hidden size, c channels on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from short_conv import ShortConvSizes, sizes
from torch import Tensor, nn

from megatron_hybrid.layers.parts import store_by_parts, store_children
from megatron_hybrid.layers.spec import Build, mixer_layer


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer on either backend: a norm, this mixer, and the residual, in a ``TransformerLayer``."""
    mixer = ModuleSpec(
        module=ShortConv,
        params={"sizes": sizes(build.args)},
        submodules=ShortConvSubmodules(in_proj=build.parts.normed_column, out_proj=build.parts.row),
    )
    return mixer_layer(build.parts, "in_proj", mixer)


@dataclass
class ShortConvSubmodules:
    """The two projections."""

    in_proj: Any
    out_proj: Any


class ShortConv(MegatronModule):
    """``W_out(c * conv(b * x))``."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ShortConvSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        sizes: ShortConvSizes,
        cp_comm_type: str | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.local = sizes.shard(self.tp_group.size())
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        shape = (self.local.channels, 1, self.local.taps)
        self.conv = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
        set_tensor_model_parallel_attributes(self.conv, True, 0, 1)
        with get_cuda_rng_tracker().fork():
            nn.init.uniform_(self.conv, -(sizes.taps**-0.5), sizes.taps**-0.5)
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            3 * sizes.channels,
            **shared,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
        )
        self.out_proj = build_module(
            submodules.out_proj,
            sizes.channels,
            config.hidden_size,
            **shared,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
        )

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (s local under sequence parallelism) to ([s, b, h], None)."""
        projected, _ = self.in_proj(hidden_states)  # [s, b, 3 c]
        b, c, x = projected.chunk(3, -1)  # [s, b, c] each
        x = (b * x).permute(1, 2, 0)  # [b, c, s]
        x = nn.functional.pad(x, (self.local.taps - 1, 0))  # [b, c, s + taps - 1]
        y = nn.functional.conv1d(x, self.conv, groups=self.local.channels)  # [b, c, s]
        return self.out_proj(c * y.permute(2, 0, 1))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Tensors as a checkpoint has them, so that they load at any tensor-parallel size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result = make_sharded_tensors_for_checkpoint(
            {"conv": self.conv},
            prefix,
            {"conv": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        result |= store_children(self, prefix, sharded_offsets, metadata, self.tp_group)
        # each rank has its own channels of b, c and x: the weight is stored as three
        store_by_parts(result, f"{prefix}in_proj.weight", dict.fromkeys("bcx", self.local.channels))
        return result
