"""The intra-layer hybrid (symbol P): attention and Mamba-2 side by side in one layer.

    f(X) = W_out [ Norm(Attn(X)) ; Norm(SSM(X)) ]

This is the study's final design (Bae et al., arXiv:2510.04800, table 18, last design: norm in each branch, no
scale, subtraction, separate output projections, separate values): with separate output projections
``W_m m - W_a a`` is one matrix over the concatenated branches whose attention half is initialised with the
other sign, and the initial distribution is symmetric. Queries and keys are narrow, values keep the full width
(appendix D).

Shapes: s sequence (whole, after the sequence-parallel gather), b batch, h hidden; sizes marked ``_local`` are
those of one tensor-parallel rank.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from megatron_hybrid.model.attention import RoPE, TorchCoreAttention, rotary_table
from megatron_hybrid.model.intra_sizes import IntraSizes
from megatron_hybrid.model.mamba import HybridMambaMixer


@dataclass
class IntraSubmodules:
    """The two projections, and the attention core between them."""

    in_proj: Any
    out_proj: Any
    core_attention: Any = TorchCoreAttention


class PassThrough(nn.Module):
    """Stands where upstream's mixers build their own projections; takes any arguments, returns its input."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.weight = SimpleNamespace()  # upstream hangs partition sizes on it

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return {}


class AttentionBranch(SelfAttention):
    """Upstream's self-attention between the fused projections, with values of their own width."""

    def __init__(self, config: TransformerConfig, sizes: IntraSizes, core_attention: Any, **kwargs: Any):
        config = copy.copy(config)
        config.num_attention_heads = sizes.num_attention_heads
        config.num_query_groups = sizes.num_query_groups
        config.kv_channels = sizes.qk_head_dim
        submodules = SelfAttentionSubmodules(
            linear_qkv=PassThrough, core_attention=core_attention, linear_proj=PassThrough
        )
        super().__init__(config, submodules, attn_mask_type=AttnMaskType.causal, **kwargs)
        self.val_hidden_size = sizes.value_head_dim

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, (q k v)_local] to q [s, b, n, d], k [s, b, g, d], v [s, b, g, dv], local heads."""
        n, g = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        d, dv = self.hidden_size_per_attention_head, self.val_hidden_size
        q, k, v = hidden_states.split([n * d, g * d, g * dv], -1)
        return tuple(t.unflatten(-1, (-1, width)) for t, width in ((q, d), (k, d), (v, dv)))


class MambaBranch(HybridMambaMixer):
    """Upstream's Mamba-2 mixer between the fused projections, its output normalised head by head.

    Upstream normalises over ``d_inner / ngroups`` channels. Here a group is a head, in both branches: such
    groups do not depend on how many ranks share the layer.
    """

    def __init__(self, config: TransformerConfig, sizes: IntraSizes, **kwargs: Any):
        config = copy.copy(config)
        config.mamba_num_heads = sizes.ssm_dim // config.mamba_head_dim
        submodules = MambaMixerSubmodules(in_proj=PassThrough, out_proj=PassThrough)
        super().__init__(config, submodules, d_model=config.hidden_size, **kwargs)
        self.norm.group_size = self.headdim

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Upstream's (core/ssm/mamba_mixer.py:1354) without the input projection, which this branch lacks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        result = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        groups = self.ngroups_local_tp * self.d_state
        for name in ("conv1d_weight", "conv1d_bias"):
            result[prefix + name].key = prefix + name.replace("_", ".")
            result[prefix + name] = _split_tensor_factory(
                result[prefix + name], [self.d_inner_local_tp, groups, groups], ["x", "B", "C"], 0
            )
        result.update(
            sharded_state_dict_default(self.norm, f"{prefix}norm.", sharded_offsets, metadata, tp_group=self.tp_group)
        )
        return result


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head of the attention branch, with one weight for each channel.

    The weight is split over the tensor-parallel ranks with the heads.
    """

    def __init__(self, num_heads_local: int, head_dim: int, eps: float, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.head_dim, self.eps, self.tp_group = head_dim, eps, tp_group
        self.weight = nn.Parameter(
            torch.ones(num_heads_local * head_dim, dtype=dtype, device=torch.cuda.current_device())
        )
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, (n dv)_local] to the same shape."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        return nn.functional.rms_norm(heads, (self.head_dim,), eps=self.eps).flatten(-2) * self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class IntraHybrid(MegatronModule):
    """Both branches between one fused column-parallel and one fused row-parallel projection.

    Two mixers of their own would cost two all-gathers and two reduce-scatters under sequence parallelism and
    four matrix products; fused, it is one, one and two. It stands in the self-attention slot of a
    ``TransformerLayer``.

    Args:
        sizes: Global widths.
        rope: Rotary positions of the attention branch, or None.
        a_init_range: Range of the uniform distribution that -A starts from.
        recompute: Parts to recompute in the backward pass: "intra" (all between the projections) or "ssm".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: IntraSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        sizes: IntraSizes,
        rope: RoPE | None = None,
        a_init_range: tuple[float, float] = (1.0, 16.0),
        recompute: tuple[str, ...] = (),
        cp_comm_type: str | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        branch = {"layer_number": layer_number, "pg_collection": pg_collection, "pp_layer_offset": pp_layer_offset}
        self.attention = AttentionBranch(config, sizes, submodules.core_attention, **branch)
        self.mamba = MambaBranch(config, sizes, A_init_range=a_init_range, recompute="ssm" in recompute, **branch)
        self.recompute = "intra" in recompute
        self.rotary = rope.build(sizes.qk_head_dim, config, pg_collection.cp) if rope else None

        n, g = self.attention.num_attention_heads_per_partition, self.attention.num_query_groups_per_partition
        states = self.mamba.ngroups_local_tp * self.mamba.d_state
        self.attention_norm = HeadRMSNorm(
            n, sizes.value_head_dim, config.layernorm_epsilon, config.params_dtype, self.tp_group
        )
        self.in_parts = {
            "q": n * sizes.qk_head_dim,
            "k": g * sizes.qk_head_dim,
            "v": g * sizes.value_head_dim,
            "z": self.mamba.d_inner_local_tp,
            "x": self.mamba.d_inner_local_tp,
            "B": states,
            "C": states,
            "dt": self.mamba.nheads_local_tp,
        }
        self.out_parts = {"attention": n * sizes.value_head_dim, "mamba": self.mamba.d_inner_local_tp}
        self.attention_width = sum(self.in_parts[part] for part in "qkv")
        tp = self.tp_group.size()
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            tp * sum(self.in_parts.values()),
            **shared,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            name=f"{name}.in_proj" if name else None,
        )
        # upstream's resharding of live models reads the sizes of packed parts from here
        self.in_proj.weight.partition_sizes = list(self.in_parts.values())
        self.out_proj = build_module(
            submodules.out_proj,
            tp * sum(self.out_parts.values()),
            config.hidden_size,
            **shared,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            name=f"{name}.out_proj" if name else None,
        )
        self.out_proj.weight.partition_sizes = list(self.out_parts.values())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        rotary_pos_cos: Any = None,
        rotary_pos_sin: Any = None,
        rotary_pos_cos_sin: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (s local under sequence parallelism) to ([s, b, h], None).

        The model's rotary table is ignored: the layer has its own.

        Raises:
            ValueError: Inference or packed sequences are asked for, which this layer does not have yet.
        """
        if inference_context is not None or packed_seq_params is not None:
            raise ValueError("P layers have no inference cache and no packed sequences yet: train unpacked.")
        angles = rotary_table(self.rotary, hidden_states, self.config, None, None)
        projected, _ = self.in_proj(hidden_states)
        if self.recompute and self.training:
            branches = tensor_parallel.checkpoint(self._branches, False, projected, angles)
        else:
            branches = self._branches(projected, angles)
        return self.out_proj(branches)

    def _branches(self, projected: Tensor, angles: Tensor | None) -> Tensor:
        """[s, b, sum(in_parts)] to [s, b, sum(out_parts)]."""
        width = projected.shape[-1]
        qkv, zxbcdt = projected.split([self.attention_width, width - self.attention_width], -1)
        attended, _ = self.attention(qkv, None, rotary_pos_emb=angles)
        scanned, _ = self.mamba(zxbcdt)
        return torch.cat([self.attention_norm(attended), scanned], -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The fused weights are stored by their named parts, so that they load at any tensor-parallel size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result: dict = {}
        for name, module in self.named_children():
            result.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        for name, parts, dim in (("in_proj", self.in_parts, 0), ("out_proj", self.out_parts, 1)):
            key = f"{prefix}{name}.weight"
            factory = _split_tensor_factory(result[key], list(parts.values()), list(parts), dim)
            # upstream's factory puts the parts together along the first dimension whatever it split
            result[key] = replace(factory, merge_fn=partial(torch.cat, dim=dim))
        return result
