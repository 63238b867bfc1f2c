"""The settings that Megatron lacks; each field is also a command-line flag.

``pretrain_hybrid.py --help`` shows the docstrings below as the help texts, and a field
``swa_window`` is the flag ``--swa-window``. Everything that Megatron already has a flag for
(``--hidden-size``, ``--mamba-state-dim``, ``--rotary-base`` ...) stays Megatron's.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class HybridConfig:
    """Settings of a hybrid run beside Megatron's own."""

    recipe: str | None = None
    """Named run that supplies defaults for all other flags; see --list-recipes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. auto takes CUDA when there is a device, else the CPU engine."""

    backend: Literal["auto", "te", "torch"] = "auto"
    """Layer implementations. auto takes Transformer Engine on CUDA when it is installed, else torch."""

    num_blocks: int | None = None
    """Number of blocks (a mixer and its FFN) from which the layer pattern is made."""

    block_ratio: str | None = None
    """Attention-bearing blocks to other blocks, such as 1:5, 1:0 (all) or 0:1 (none)."""

    block_placement: Literal["scatter", "cluster", "sandwich", "front", "middle", "end"] = "scatter"
    """Where the attention-bearing blocks stand."""

    block_mixers: str = "P:M"
    """Mixer symbol of the attention-bearing blocks and of the others, in the order of --block-ratio."""

    ffn: Literal["dense", "moe", "none"] = "dense"
    """Feed-forward layer of each block: dense (-), moe (E) or none."""

    swa_window: int = 512
    """W layers: tokens that a query sees, itself included, beside the sinks."""

    swa_sinks: int = 64
    """W layers: first tokens of the sequence that every query sees."""

    swa_rotary_base: int = 10000
    """W layers: RoPE base. W layers never use RoPE scaling."""

    intra_num_attention_heads: int | None = None
    """P layers: attention heads. Default: half of --num-attention-heads."""

    intra_num_query_groups: int | None = None
    """P layers: key/value heads. Default: half of --num-query-groups."""

    intra_qk_dim: int | None = None
    """P layers: total query width, all heads together. Default: half of --hidden-size."""

    intra_value_dim: int | None = None
    """P layers: total width of the attention output, all heads together. Default: --hidden-size."""

    intra_ssm_dim: int | None = None
    """P layers: inner width of the Mamba branch. Default: --hidden-size."""

    mamba_a_init_range: list[float] = field(
        default_factory=lambda: [1.0, 16.0], metadata={"argparse_meta": {"nargs": 2}}
    )
    """M and P layers: range of the uniform distribution that -A starts from (the study: 0.01 2.0)."""

    hybrid_recompute: list[str] = field(
        default_factory=list, metadata={"argparse_meta": {"nargs": "*", "choices": ["ssm", "intra"]}}
    )
    """Recompute in the backward pass: the SSM core of M and P layers (ssm), whole P mixers (intra)."""
