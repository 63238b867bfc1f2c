"""Upstream's self-attention whose projection becomes rotated heads in one kernel.

Shape letters: s tokens of a sample, b samples of a micro-batch, h hidden size, n query heads, g key and value heads,
d head size of Q and K, dv head size of V. One rank's share is marked: n/tp and g/tp heads (at least one), s/cp tokens.
t is the number of tokens of the hidden state on a rank: s/cp, or s/(cp tp) under sequence parallelism.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_hybrid.kernels.head_columns import HeadColumns, Turns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, takes, turns_of


class RotatedHeads(SelfAttention):
    """Self-attention whose split of the projection and RoPE are one kernel each way, where that serves.

    Upstream copies the queries, turns Q and K by some ten operations over memory and concatenates the gradients
    (core/transformer/attention.py:1812, core/models/common/embeddings/rope_utils.py:88). The kernel serves Q, K and V
    as the projection has them: :func:`not_served` says when the layer is built which options need upstream's way.
    Upstream's way is also that of calls with tensors that Triton does not take (CPU), with an inference cache, and with
    documents as lists of lengths (thd).

    The arguments are upstream's.
    """

    copies_values = True
    """V is a tensor of its own, so that the projection is not kept."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kernel_serves = not not_served(self)
        self._turns: Turns | None = None
        self._by_kernel = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """[t, b, h] to ([t, b, h], None); ``rotary_pos_emb`` [s/cp, 1, 1, d] are the angles, or None."""
        angles = kwargs.get("rotary_pos_emb")
        self._by_kernel = self._takes(hidden_states, angles, kwargs)
        if self._by_kernel:
            kwargs["rotary_pos_emb"] = None
            if angles is not None:
                factor = self._yarn_concentration_factor
                self._turns = turns_of(angles, self.config.rotary_interleaved, factor)
        try:
            return super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            self._turns, self._by_kernel = None, False

    def _takes(self, hidden_states: Tensor, angles: Any, kwargs: dict[str, Any]) -> bool:
        packed = kwargs.get("packed_seq_params")
        if packed is not None and packed.qkv_format == "thd" or isinstance(angles, tuple):
            return False
        return self.kernel_serves and kwargs.get("inference_context") is None and takes(hidden_states)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """[t, b, h] to q [s/cp, b, n/tp, d], k [s/cp, b, g/tp, d], v [s/cp, b, g/tp, dv], turned if by our kernel."""
        if not self._by_kernel:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        projected, _ = self.linear_qkv(hidden_states)  # [s/cp, b, columns]
        return split_and_rotate(projected, self.head_columns(projected), self._turns, self.copies_values)

    def head_columns(self, projected: Tensor) -> HeadColumns:
        """Where the heads stand in the projection: in g/tp groups of n/g query heads, a key and a value."""
        n, g = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        return HeadColumns(g, n // g, 1, 1, self.hidden_size_per_attention_head, self.val_hidden_size)


def not_served(attention: SelfAttention) -> list[str]:
    """The options of a layer for which heads do not come out of the projection as our kernel takes them."""
    config = attention.config
    options = {
        "norms of queries and keys": attention.q_layernorm is not None or attention.k_layernorm is not None,
        "gates of the output": config.attention_output_gate,
        "fewer key heads than tensor-parallel ranks": config.num_query_groups < attention.world_size,
        "layers without RoPE among others": bool(config.no_rope_freq),
        "upstream's fusion of projection and RoPE": config.fused_single_qkv_rope,
        "activations on the host": config.fine_grained_activation_offloading,
        "upstream's tests at run time": config.test_mode,
    }
    return [name for name, there in options.items() if there]
