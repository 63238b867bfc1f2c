"""Upstream's gated delta net."""

import copy
from typing import Any

from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.layers.spec import Build, mixer_layer


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``G``; on upstream's torch implementation if flash-linear-attention is not installed."""
    parts = build.parts
    installed = common.chunk_gated_delta_rule is not None
    mixer = ModuleSpec(
        module=HybridDeltaNet if installed else TorchGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=parts.mixer_column, out_norm=parts.norm, out_proj=parts.row),
    )
    return mixer_layer(parts, "in_proj", mixer)


class HybridDeltaNet(GatedDeltaNet):
    """Upstream's, whose input projection may have any width under ``--fp8-format`` too: it is padded inside."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        config = copy.copy(config)
        config.fp8 = None  # upstream would refuse odd widths (core/ssm/gated_delta_net/common.py:198)
        super().__init__(config, *args, **kwargs)


class TorchGatedDeltaNet(HybridDeltaNet):
    """Upstream's torch implementation, which ``deterministic_mode`` selects; set for this layer only."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        config = copy.copy(config)
        config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)
