"""Attention layers with a RoPE of their own, and the attention core of the torch backend.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, n query heads, g key and value heads,
d head size of Q and K, dv head size of V. One rank's share is marked: n/tp and g/tp heads (at least one), s/cp tokens.
t is the number of tokens of the hidden state on a rank: s/cp, or s/(cp tp) under sequence parallelism.
"""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_hybrid.kernels.attention import Preference, attention
from megatron_hybrid.layers.attention.rotated_heads import RotatedHeads
from megatron_hybrid.layers.spec import Build, mixer_layer


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding of one kind of layer.

    Upstream has one table per model, with one head size, and no frequency scaling for hybrid models
    (core/models/hybrid/hybrid_model.py:257).
    """

    base: int = 10000
    percent: float = 1.0
    scaling_factor: float | None = None
    """Factor of Llama-3 frequency scaling, or None. Upstream fixes the rest: low 1, high 4, original length 8192."""

    def build(self, head_dim: int, config: TransformerConfig, cp_group: Any) -> RotaryEmbedding:
        """The table for heads of ``head_dim`` channels."""
        return RotaryEmbedding(
            kv_channels=head_dim,
            rotary_percent=self.percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=self.base,
            rope_scaling=self.scaling_factor is not None,
            rope_scaling_factor=self.scaling_factor or 1.0,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=cp_group,
        )


def model_rope(args: Namespace) -> RoPE | None:
    """RoPE of full attention; None for NoPE."""
    if args.position_embedding_type != "rope":
        return None
    return RoPE(args.rotary_base, args.rotary_percent, args.rope_scaling_factor if args.use_rope_scaling else None)


def window_rope(args: Namespace) -> RoPE | None:
    """RoPE of sliding-window attention (``W``), which has its own base and no scaling; None for NoPE."""
    return RoPE(args.swa_rotary_base, args.rotary_percent) if args.position_embedding_type == "rope" else None


def spec(symbol: str, build: Build) -> ModuleSpec:
    """The layer ``*`` (full attention) or ``W`` (sliding window)."""
    args, parts = build.args, build.parts
    if symbol == "W":
        core = torch_core(args)
        params = {"rope": window_rope(args), "window": args.swa_window, "sinks": args.swa_sinks}
    else:  # attention inside packed documents needs a core that takes document ids
        ours = args.reset_attention_mask or parts.core_attention is TorchCoreAttention
        core = torch_core(args) if ours else parts.core_attention
        params = {"rope": model_rope(args)}
    mixer = ModuleSpec(
        module=HybridSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **params},
        submodules=SelfAttentionSubmodules(linear_qkv=parts.normed_column, core_attention=core, linear_proj=parts.row),
    )
    return mixer_layer(parts, "linear_qkv", mixer)


def torch_core(args: Namespace) -> Any:
    """What builds :class:`TorchCoreAttention` for a run."""
    return partial(TorchCoreAttention, prefer=args.attention_kernel)


class HybridSelfAttention(RotatedHeads):
    """Upstream's self-attention with a RoPE of its own.

    Args:
        rope: RoPE of this layer; None for none (NoPE).
        window: Keys that a query sees, including its own position; None for all up to it.
        sinks: First keys of the sequence (of each packed document) that every query sees in addition to its window.

    The other arguments are upstream's (core/transformer/attention.py:1644).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        *,
        rope: RoPE | None = None,
        window: int | None = None,
        sinks: int = 0,
    ):
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        if window is not None:
            self.core_attention.window, self.core_attention.sinks = window, sinks
        self.rotary = rope.build(self.hidden_size_per_attention_head, config, self.pg_collection.cp) if rope else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """[t, b, h] to ([t, b, h], None); the model's ``rotary_pos_emb`` is ignored."""
        kwargs["rotary_pos_emb"] = rotary_table(
            self.rotary, hidden_states, self.config, kwargs.get("inference_context"), kwargs.get("packed_seq_params")
        )
        return super().forward(hidden_states, attention_mask, **kwargs)


def rotary_table(
    rotary: RotaryEmbedding | None,
    hidden_states: Tensor,
    config: TransformerConfig,
    inference_context: Any,
    packed_seq_params: PackedSeqParams | None,
) -> Tensor | None:
    """The angles for this rank's tokens, [s/cp, 1, 1, rotated channels of d] (whole s for the packed format thd).

    Args:
        hidden_states: [t, b, h].
    """
    if rotary is None:
        return None
    packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
    lengths = packed_seq_params if packed else None  # given any, upstream reads the longest document from it
    length = rotary.get_rotary_seq_len(inference_context, None, hidden_states, config, lengths)
    return rotary(length, packed_seq=packed)


class TorchCoreAttention(MegatronModule):
    """Causal attention on torch's kernels, for CUDA and CPU, with context parallelism.

    Upstream's ``DotProductAttention`` stores the scores, has no context parallelism, and needs values as wide as
    queries. Under context parallelism each rank holds two zigzag chunks of the sequence (core/utils.py,
    ``get_batch_on_this_cp_rank``): K and V are gathered from all ranks, and each chunk of queries attends to its prefix
    of them. Packed documents come as ``PackedSeqParams.seq_idx`` [b, s]: on every rank, the document ids of the whole
    sequence.

    The arguments are those of ``CoreAttentionBuilder`` (core/transformer/attention.py), and which kernel to prefer on
    CUDA (``kernels/attention.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        prefer: Preference = "auto",
    ):
        super().__init__(config)
        self.prefer = prefer
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.dropout = config.attention_dropout
        self.window: int | None = None
        self.sinks = 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Query [s/cp, b, n/tp, d], key [s/cp, b, g/tp, d], value [s/cp, b, g/tp, dv] to [s/cp, b, n/tp dv].

        Raises:
            ValueError: There is an attention mask, a bias, or packed documents without ids (thd).
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("The torch attention core is causal only: it supports no attention masks and no biases.")
        documents = packed_seq_params.seq_idx if packed_seq_params is not None else None  # [b, s]
        if packed_seq_params is not None and (packed_seq_params.qkv_format != "sbhd" or documents is None):
            raise ValueError(
                f"The torch attention core takes packed documents as qkv_format sbhd with seq_idx, not as "
                f"{packed_seq_params.qkv_format} with cu_seqlens."
            )
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        dropout = self.dropout if self.training else 0.0
        length = query.shape[0]
        cp, rank = (self.cp_group.size(), self.cp_group.rank()) if self.cp_group is not None else (1, 0)
        # q [b, n/tp, s/cp, d], k [b, g/tp, s, d], v [b, g/tp, s, dv]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *self._gather(key, value, cp)))

        def attend(q: Tensor, offset: int) -> Tensor:  # [b, n/tp, queries, d] to [queries, b, n/tp, dv]
            # Ranks hold different heads and need different dropout masks, as in
            # core/transformer/dot_product_attention.py. Under sequence parallelism the whole stack runs on the rank's
            # own random stream already.
            own_stream = dropout > 0 and not self.config.sequence_parallel
            with tensor_parallel.get_cuda_rng_tracker().fork() if own_stream else nullcontext():
                rule = scale, self.window, self.sinks, offset, dropout, documents, self.prefer
                return attention(q, k, v, *rule).permute(2, 0, 1, 3)

        if cp == 1:
            out = attend(q, k.shape[2] - length)  # the queries stand at the last keys, with a cache too
        else:
            half = length // 2
            first, second = q.split(half, 2)  # [b, n/tp, s/(2 cp), d]
            out = torch.cat([attend(first, rank * half), attend(second, (2 * cp - 1 - rank) * half)])
        return out.reshape(length, query.shape[1], -1)  # [s/cp, b, n/tp, dv] to [s/cp, b, n/tp dv]

    def _gather(self, key: Tensor, value: Tensor, cp: int) -> tuple[Tensor, Tensor]:
        """K and V [s/cp, b, g/tp, ...] to those of the whole sequence in its order, [s, b, g/tp, ...].

        Each rank holds the chunks ``rank`` and ``2 cp - 1 - rank`` of the sequence.
        """
        if cp == 1:
            return key, value
        order = [0] * (2 * cp)
        for rank in range(cp):
            order[rank], order[2 * cp - 1 - rank] = 2 * rank, 2 * rank + 1

        def gather(x: Tensor) -> Tensor:
            x = tensor_parallel.gather_from_sequence_parallel_region(x, group=self.cp_group)  # [s, b, g/tp, ...]
            chunks = x.chunk(2 * cp)  # [s/(2 cp), b, g/tp, ...], in the order of the ranks
            return torch.cat([chunks[i] for i in order])

        return gather(key), gather(value)
