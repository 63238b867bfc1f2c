"""The intra-layer hybrid (symbol P): two mixers in parallel in one layer.

    f(X) = W_out( s_1 Norm(B_1(X))  (+)  s_2 Norm(B_2(X)) )

``design.py`` has the axes of the design, ``fusion.py`` norm, scale and fusion. This module has the branches and the two
projections around them.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, i and o channels of the fused input and
output projection (sums of ``in_parts`` and ``out_parts``), n query heads, g key heads, d head size of Q and K, dv head
size of V, w output channels of a branch. One rank's share is marked: i/tp, n/tp and so on (parts with fewer heads or
groups than ranks: one of these), s/cp tokens. t is the number of tokens of the hidden state on a rank: s/cp, or
s/(cp tp) under sequence parallelism.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from megatron_hybrid.kernels.head_columns import HeadColumns
from megatron_hybrid.layers.attention.module import RoPE, TorchCoreAttention, model_rope, rotary_table
from megatron_hybrid.layers.attention.rotated_heads import RotatedHeads
from megatron_hybrid.layers.intra.branch_inputs import BranchInputs
from megatron_hybrid.layers.intra.design import IntraDesign, design
from megatron_hybrid.layers.intra.fusion import IntraFusion
from megatron_hybrid.layers.mamba.module import HybridMambaMixer, core
from megatron_hybrid.layers.parts import SharedRowsLinear, store_by_parts, store_children
from megatron_hybrid.layers.spec import Build, mixer_layer


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``P``."""
    args, parts, d = build.args, build.parts, design(build.args)
    if any(part.is_shared(args.tensor_model_parallel_size) for part in d.in_parts):
        parts = parts.with_shared_rows()
    mixer = ModuleSpec(
        module=IntraHybrid,
        params={
            "design": d,
            "rope": model_rope(args),
            "depths": build.mixer_depths,
            "a_init_range": tuple(args.mamba_a_init_range),
            "recompute": tuple(args.hybrid_recompute),
            "ssm_core": core(args),
        },
        submodules=IntraSubmodules(in_proj=parts.mixer_column, out_proj=parts.row),
    )
    return mixer_layer(parts, "in_proj", mixer)


@dataclass
class IntraSubmodules:
    """Modules of the two projections, and of the attention core between them."""

    in_proj: Any
    out_proj: Any
    core_attention: Any = TorchCoreAttention


class PassThrough(nn.Module):
    """Replaces the projections of upstream's mixers: takes any arguments, returns its input."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.weight = SimpleNamespace()  # upstream sets partition sizes on it

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return {}


class AttentionBranch(RotatedHeads):
    """Upstream's self-attention between the fused projections; V may have more heads than K and another head size."""

    copies_values = False  # the other branch keeps the projection

    def __init__(
        self,
        config: TransformerConfig,
        design: IntraDesign,
        core_attention: Any,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ):
        tp = pg_collection.tp.size()
        config = copy.copy(config)
        config.num_attention_heads = design.num_attention_heads
        config.num_query_groups = max(design.num_query_groups, tp)  # at least one on each rank, shared if need be
        config.kv_channels = design.qk_head_dim
        submodules = SelfAttentionSubmodules(
            linear_qkv=PassThrough, core_attention=core_attention, linear_proj=PassThrough
        )
        super().__init__(config, submodules, attn_mask_type=AttnMaskType.causal, pg_collection=pg_collection, **kwargs)
        self.val_hidden_size = design.value_head_dim
        self.core_attention.window, self.core_attention.sinks = design.window, design.sinks

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s/cp, b, (q k v)/tp] to q [s/cp, b, n/tp, d], k [s/cp, b, g/tp, d], v [s/cp, b, g/tp, dv].

        Where each query head has its own values, the keys are repeated for them, so that g = n.
        """
        if self._turns is not None:
            q, k, v = super().get_query_key_value_tensors(hidden_states)
        else:
            # [s/cp, b, n/tp d], [s/cp, b, g/tp d], [s/cp, b, g/tp dv or n/tp dv]
            heads = self.head_columns(hidden_states)
            widths = heads.queries * heads.width, heads.keys * heads.width, heads.values * heads.value_width
            sizes = heads.width, heads.width, heads.value_width
            parts = zip(hidden_states.split(widths, -1), sizes, strict=True)
            q, k, v = (x.unflatten(-1, (-1, size)) for x, size in parts)
        return q, k.repeat_interleave(v.shape[2] // k.shape[2], 2) if v.shape[2] != k.shape[2] else k, v

    def head_columns(self, projected: Tensor) -> HeadColumns:
        """All query heads, then all key heads, then as many value heads as the design has."""
        n, g = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        d, dv = self.hidden_size_per_attention_head, self.val_hidden_size
        return HeadColumns(1, n, g, (projected.shape[-1] - (n + g) * d) // dv, d, dv)


class MambaBranch(HybridMambaMixer):
    """Upstream's Mamba-2 mixer between the fused projections. Its kernel applies the gate, the fusion the norm."""

    def __init__(self, config: TransformerConfig, design: IntraDesign, **kwargs: Any):
        config = copy.copy(config)
        config.mamba_num_heads, config.mamba_head_dim = design.ssm_heads, design.ssm_head_dim
        config.mamba_num_groups, config.mamba_state_dim = design.ssm_groups, design.state_dim
        submodules = MambaMixerSubmodules(in_proj=PassThrough, out_proj=PassThrough)
        super().__init__(config, submodules, d_model=config.hidden_size, rmsnorm=False, **kwargs)


class IntraHybrid(MegatronModule):
    """Both branches between one fused column-parallel and one fused row-parallel projection.

    Two separate mixers would cost two all-gathers and two reduce-scatters under sequence parallelism and four matrix
    products; the fused projections cost one, one and two. The module takes the place of self-attention in a
    ``TransformerLayer``.

    Args:
        design: Axes and global widths.
        rope: RoPE of the attention branches; None for NoPE.
        depths: For each layer of the model, the number of mixers before it.
        a_init_range: Range of the uniform distribution that initialises -A.
        recompute: What to recompute in the backward pass: "intra" (all between the projections), "ssm".
        ssm_core: What :func:`megatron_hybrid.layers.mamba.module.core` returns.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: IntraSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        design: IntraDesign,
        rope: RoPE | None = None,
        depths: tuple[int, ...] = (0,),
        a_init_range: tuple[float, float] = (1.0, 16.0),
        recompute: tuple[str, ...] = (),
        ssm_core: Callable | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ):
        super().__init__(config)
        self.design, self.layer_number, self.tp_group = design, layer_number, pg_collection.tp
        self.recompute = "intra" in recompute
        shared = {
            "config": config,
            "design": design,
            "layer_number": layer_number,
            "pg_collection": pg_collection,
            "pp_layer_offset": pp_layer_offset,
        }
        make: dict[str, Callable[[], nn.Module]] = {
            "attention": lambda: AttentionBranch(core_attention=submodules.core_attention, **shared),
            "mamba": lambda: MambaBranch(
                A_init_range=a_init_range, recompute="ssm" in recompute, core=ssm_core, **shared
            ),
        }
        for branch, kind in zip(design.names, design.branches, strict=True):
            self.add_module(branch, make[kind]())
        has_attention = "attention" in design.branches
        self.rotary = rope.build(design.qk_head_dim, config, pg_collection.cp) if rope and has_attention else None
        depth = depths[min(layer_number, len(depths)) - 1]
        self.fusion = IntraFusion(config, design, depth, self.tp_group)

        tp = self.tp_group.size()
        self.in_parts = {part.name: part.local_rows(tp) for part in design.in_parts}
        self.out_parts = {part: width // tp for part, width in design.out_parts.items()}
        self.inputs = BranchInputs(self.in_parts, [design.branch_parts(0), design.branch_parts(1)])
        self._build_projections(submodules, name)

    def _build_projections(self, submodules: IntraSubmodules, name: str | None) -> None:
        config, tp = self.config, self.tp_group.size()
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        in_proj = getattr(submodules.in_proj, "module", submodules.in_proj)
        own: dict[str, Any] = {"keeps_padding": True} if getattr(in_proj, "pads_rows", False) else {}
        if in_proj is SharedRowsLinear:
            own["parts"] = self.design.in_parts
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            tp * sum(self.in_parts.values()),
            **shared,
            **own,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            name=f"{name}.in_proj" if name else None,
        )
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
        # where upstream's resharding of models in memory looks for the sizes of fused parts
        if in_proj is not SharedRowsLinear:
            self.in_proj.weight.partition_sizes = list(self.in_parts.values())
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
        """[t, b, h] to ([t, b, h], None). The model's rotary table is ignored: the layer has its own.

        Raises:
            ValueError: There is an inference context; this layer has no cache yet.
        """
        if inference_context is not None:
            raise ValueError("P layers have no inference cache yet: run the model on whole sequences.")
        angles = rotary_table(self.rotary, hidden_states, self.config, None, packed_seq_params)  # [s/cp, 1, 1, d]
        projected, _ = self.in_proj(hidden_states)  # [s/cp, b, i/tp or a few zeros more]
        if self.recompute and self.training:
            # checkpoint takes only tensors, and packed_seq_params is none
            run = lambda x, angles: self._between(x, angles, packed_seq_params)  # noqa: E731
            fused = tensor_parallel.checkpoint(run, False, projected, angles)
        else:
            fused = self._between(projected, angles, packed_seq_params)  # [s/cp, b, o/tp]
        return self.out_proj(fused)

    def _between(self, projected: Tensor, angles: Tensor | None, packed_seq_params: Any) -> Tensor:
        """[s/cp, b, i/tp or more] to [s/cp, b, o/tp]."""
        branches, gate = self.inputs.split(projected)  # gate [s/cp, b, 1 or 2] or None

        def run(branch: int) -> Tensor:
            module = getattr(self, self.design.names[branch])
            own = branches[branch]
            x = own[0] if len(own) == 1 else torch.cat(own, -1)  # [s/cp, b, (q k v)/tp or (z x B C dt)/tp]
            if self.design.branches[branch] == "attention":
                return module(x, None, rotary_pos_emb=angles, packed_seq_params=packed_seq_params)[0]
            return module(x, packed_seq_params=packed_seq_params)[0]

        return self.fusion(run(0), run(1), gate)  # of two tensors [s/cp, b, w/tp]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The fused weights are stored part by part, so that they load at any tensor-parallel size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result = store_children(self, prefix, sharded_offsets, metadata, self.tp_group)
        if not isinstance(self.in_proj, SharedRowsLinear):  # which stores its own parts
            store_by_parts(result, f"{prefix}in_proj.weight", self.in_parts)
        store_by_parts(result, f"{prefix}out_proj.weight", self.out_parts, dim=1)
        return result
