"""The widths of the intra-layer hybrid, from flags."""

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class IntraSizes:
    """Global widths of a P layer (:class:`megatron_hybrid.config.HybridConfig` documents the flags)."""

    num_attention_heads: int
    num_query_groups: int
    qk_dim: int
    """All query heads together; each key head is as wide as a query head."""
    value_dim: int
    """All heads of the attention output together; each value head is value_dim / num_attention_heads wide."""
    ssm_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_dim // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        return self.value_dim // self.num_attention_heads


def intra_sizes(args: Namespace) -> IntraSizes:
    """Sizes of the P layers: the ``--intra-*`` flags, or the study's halves of the model's own sizes."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return IntraSizes(
        num_attention_heads=args.intra_num_attention_heads or args.num_attention_heads // 2,
        num_query_groups=args.intra_num_query_groups or max(1, groups // 2),
        qk_dim=args.intra_qk_dim or args.hidden_size // 2,
        value_dim=args.intra_value_dim or args.hidden_size,
        ssm_dim=args.intra_ssm_dim or args.hidden_size,
    )
