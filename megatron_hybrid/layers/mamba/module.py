"""Upstream's Mamba-2 mixer at any tensor-parallel size, with optional recomputation of its core.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, e inner channels (heads times head
dim), g groups, n state dim, w width of the convolution. One rank's share is marked: e/tp channels, s/cp tokens. The
channels z, x, B, C and dt together are (z x B C dt)/tp; where ranks share groups, each has the n channels of B and of C
of one group. t is the number of tokens of the hidden state on a rank: s/cp, or s/(cp tp) under sequence parallelism.
"""

import copy
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_hybrid.accounting.projection import Part
from megatron_hybrid.kernels import ssm_kernels
from megatron_hybrid.layers.mamba.residual_layer import ResidualMambaLayer
from megatron_hybrid.layers.norm import SpanningRMSNorm
from megatron_hybrid.layers.parts import SharedRowsLinear, shared_by_ranks, store_by_parts, store_children
from megatron_hybrid.layers.spec import Build


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``M``."""
    args, parts = build.args, build.parts
    if args.mamba_num_groups < args.tensor_model_parallel_size:
        parts = parts.with_shared_rows()
    mixer = ModuleSpec(
        module=HybridMambaMixer,
        params={
            "A_init_range": tuple(args.mamba_a_init_range),
            "recompute": "ssm" in args.hybrid_recompute,
            "core": core(args),
        },
        submodules=MambaMixerSubmodules(in_proj=parts.mixer_column, out_proj=parts.row),
    )
    return ModuleSpec(
        module=ResidualMambaLayer,
        submodules=MambaLayerSubmodules(
            norm=parts.input_norm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.stored_as("norm.", "mixer.in_proj.layer_norm_"),
        ),
    )


def core(args: Namespace) -> Callable | None:
    """Convolution, scan and gate in one function of the layer's own layout; None: upstream's way, samples first."""
    return ssm_kernels(args.device, args.ssm_kernels).core


class SampleContextParallel(MambaContextParallel):
    """Context parallelism that splits whole samples in zigzag, whether or not documents are packed in them.

    Given ``packed_seq_params``, upstream assumes that Transformer Engine split each document over the ranks
    (core/ssm/mamba_context_parallel.py:360). Here the scan gets whole samples, and needs only the document ids.
    """

    def pre_conv_ssm(self, input_: Tensor, packed_seq_params: Any = None) -> Tensor:
        """[s/cp, b, (z x B C dt)/tp] to [s, b, (z x B C dt)/(tp cp)], in the order of the sequence."""
        return super().pre_conv_ssm(input_)

    def post_conv_ssm(self, input_: Tensor, packed_seq_params: Any = None) -> Tensor:
        """[s, b, e/(tp cp)] to [s/cp, b, e/tp], in zigzag order."""
        return super().post_conv_ssm(input_)


class HybridMambaMixer(MambaMixer):
    """``MambaMixer`` that runs on more tensor-parallel ranks than groups, and can recompute its core.

    Upstream needs whole groups on each rank (core/ssm/mamba_mixer.py:245). Here ranks whose heads belong to the same
    group each compute its B and C: the rows of the input projection and the channels of the convolution for them are
    parameters that are equal on these ranks. The gated norm is taken over the whole group, so that the function does
    not depend on the number of ranks. Upstream's modules for selective recomputation include no part of this core.

    Args:
        recompute: Save only the projected input for the backward pass, and run the core again there.
        core: As :func:`core` returns it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        recompute: bool = False,
        core: Callable | None = None,
        **kwargs: Any,
    ):
        groups, tp = config.mamba_num_groups, pg_collection.tp.size()
        config = copy.copy(config)
        config.fp8 = None  # upstream would refuse odd widths (:251), which the input projection pads
        if groups < tp:
            if issubclass(getattr(submodules.in_proj, "module", submodules.in_proj), SharedRowsLinear):
                submodules = replace(submodules, in_proj=_shared_input(config, groups))
            config.mamba_num_groups = tp  # for upstream: one group for each rank
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)
        self.cp.__class__ = SampleContextParallel
        self.recompute, self.core = recompute, core
        self.total_groups = groups
        self.shares_groups = groups < tp
        if self.shares_groups:
            self._share_groups(config)

    def _share_groups(self, config: TransformerConfig) -> None:
        """Replaces the convolution's channels of B and C by shared ones, and the norm by one over whole groups."""
        inner, width = self.d_inner_local_tp, self.d_conv
        channels = 2 * self.total_groups * self.d_state
        # weight [2 g n, 1, w], bias [2 g n]
        weight = torch.empty(channels, 1, width, dtype=config.params_dtype, device=torch.cuda.current_device())
        bias = torch.empty(channels, dtype=config.params_dtype, device=torch.cuda.current_device())
        for x in (weight, bias):  # upstream's distribution, from the random stream that is the same on all ranks
            nn.init.uniform_(x, -1 / math.sqrt(width), 1 / math.sqrt(width))
        self.conv1d_shared_weight = shared_by_ranks(nn.Parameter(weight))
        self.conv1d_shared_bias = shared_by_ranks(nn.Parameter(bias))
        for name in ("conv1d_weight", "conv1d_bias"):
            own = nn.Parameter(getattr(self, name).detach()[:inner].clone())  # [e/tp, 1, w] or [e/tp]
            tensor_parallel.set_tensor_model_parallel_attributes(own, True, 0, 1)
            setattr(self, name, own)
        if self.rmsnorm:
            self.norm = SpanningRMSNorm(inner, self.total_groups, 1e-5, config.params_dtype, self.tp_group)

    def forward(self, hidden_states: Tensor, inference_context: Any = None, **kwargs: Any) -> Any:
        """[t, b, h] to ([t, b, h], None) (core/ssm/mamba_mixer.py:463).

        Raises:
            ValueError: Inference where ranks share groups.
        """
        if inference_context is not None and self.shares_groups:
            raise ValueError(
                "Inference caches need whole groups of B and C on each tensor-parallel rank: use at most "
                f"{self.total_groups} tensor-parallel ranks (--mamba-num-groups)."
            )
        return super().forward(hidden_states, inference_context, **kwargs)

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """[s, b, (z x B C dt)/(tp cp)] to [s/cp, b, e/tp] (core/ssm/mamba_mixer.py:727)."""
        if not (self.recompute and self.training):
            return self._core(zxBCdt, packed_seq_params)
        return tensor_parallel.checkpoint(lambda x: self._core(x, packed_seq_params), False, zxBCdt)

    def _core(self, zxBCdt: Tensor, packed_seq_params: Any) -> Tensor:
        """Convolution, scan, gate and norm, in the shapes of _ssm_training."""
        if self.shares_groups:
            self.cp.conv1d_weight_cp1 = self._with_shared_channels(self.conv1d_weight, self.conv1d_shared_weight)
            self.cp.conv1d_bias_cp1 = self._with_shared_channels(self.conv1d_bias, self.conv1d_shared_bias)
        if self.core is None:
            return super()._ssm_training(zxBCdt, packed_seq_params)
        y = self.core(
            zxBCdt,
            self.cp.get_conv1d_weight().squeeze(1),  # [(x B C)/(tp cp), w]
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias().float(),
            -torch.exp(self.cp.get_A_log().float()),
            self.cp.get_D().float(),
            head_dim=self.headdim,
            groups=self.cp.ngroups_local_tpcp,
            seq_idx=None if packed_seq_params is None else packed_seq_params.seq_idx,
        )  # [s, b, e/(tp cp)]
        y = self.cp.post_conv_ssm(y, packed_seq_params)
        return self.norm(y) if self.rmsnorm else y

    def _with_shared_channels(self, own: Tensor, shared: Tensor) -> Tensor:
        """This rank's channels of the convolution: its own of x [e/tp, ...], and of shared [2 g n, ...] its group's."""
        group = self.tp_group.rank() * self.total_groups // self.tp_group.size()
        B, C = shared.unflatten(0, (2, self.total_groups, self.d_state))[:, group]  # [n, ...] each
        return torch.cat([own, B, C])  # [e/tp + 2 n, ...]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As upstream's (core/ssm/mamba_mixer.py:1354), and the same keys and shapes where ranks share groups."""
        if not self.shares_groups and isinstance(self.in_proj.weight, Tensor):
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        result = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name in own if "shared" not in name},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        result |= store_children(self, prefix, sharded_offsets, metadata, self.tp_group)
        x, states = {"x": self.d_inner_local_tp}, dict.fromkeys("BC", self.ngroups_local_tp * self.d_state)
        for name in ("weight", "bias"):
            own_parts = x if self.shares_groups else {**x, **states}
            store_by_parts(result, f"{prefix}conv1d_{name}", own_parts, stored_as=f"{prefix}conv1d.{name}")
            if self.shares_groups:
                shared_parts = dict.fromkeys("BC", self.total_groups * self.d_state)
                key = f"{prefix}conv1d_shared_{name}"
                store_by_parts(result, key, shared_parts, stored_as=f"{prefix}conv1d.{name}")
        return result


def _shared_input(config: TransformerConfig, groups: int) -> ModuleSpec:
    """The input projection with rows of B and C that ranks share; its rows are z, x, B, C, dt."""
    head_dim = config.mamba_head_dim
    heads = config.mamba_num_heads or 2 * config.hidden_size // head_dim
    inner = {name: Part(name, heads, head_dim) for name in "zx"}
    states = {name: Part(name, groups, config.mamba_state_dim) for name in "BC"}
    parts = [inner["z"], inner["x"], states["B"], states["C"], Part("dt", heads, 1)]
    return ModuleSpec(module=SharedRowsLinear, params={"parts": parts})
