"""Settings that Megatron does not have; each field is also a command-line flag.

``pretrain_hybrid.py --help`` shows the docstrings below as the help texts, and a field
``swa_window`` is the flag ``--swa-window``. Everything that Megatron already has a flag for
(``--hidden-size``, ``--mamba-state-dim``, ``--rotary-base`` ...) stays Megatron's.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_hybrid.placement import Placement


@dataclass(kw_only=True)
class HybridConfig:
    """Settings of a hybrid run besides Megatron's own."""

    recipe: str | None = None
    """Named set of defaults for all other flags; see --list-recipes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. auto: CUDA if there is a device, else the CPU engine."""

    backend: Literal["auto", "te", "torch"] = "auto"
    """Layer implementations. auto: Transformer Engine on CUDA if it is installed, else torch."""

    attention_kernel: Literal["auto", "triton", "cudnn", "torch"] = "auto"
    """Kernels of attention on CUDA, where Transformer Engine's does not serve. auto: cuDNN for full attention, this
    package's Triton kernel for windows, packed documents and context parallelism. triton: that kernel for all. cudnn:
    cuDNN for full attention on any GPU. torch: torch's choice, with Q, K and V padded to one head size, and
    FlexAttention for windows and documents. What a kernel does not take goes to torch (docs/design_space.md)."""

    ssm_kernels: Literal["auto", "triton", "mamba_ssm", "torch"] = "auto"
    """Kernels of the convolution and the scan of M and P layers: this package's in Triton, those of mamba_ssm with
    causal-conv1d (to be installed), or plain torch. auto: triton on CUDA, torch on CPU."""

    loss_kernel: Literal["auto", "fused", "plain"] = "auto"
    """Output head and cross entropy as one function that never holds the logits of a micro-batch (fused), or one after
    the other (plain). auto: fused on CUDA, unless another flag needs the logits."""

    peak_tflops: float | None = None
    """Dense peak of one GPU in TFLOP/s, the reference of the logged MFU. Default: that of the GPU in the run's
    precision, if known (megatron_hybrid/costs/hardware.py)."""

    data_blend: str | None = None
    """YAML file of the training data: sources with a name, a path, a weight and the maximum epochs; replaces
    --data-path."""

    layers_from: list[str] = field(default_factory=list, metadata={"argparse_meta": {"nargs": "*", "metavar": "FILE"}})
    """Python files that register layers of one's own for the pattern (examples/custom_layer)."""

    num_blocks: int | None = None
    """Number of blocks (a mixer and its FFN) from which the layer pattern is made."""

    block_ratio: str | None = None
    """Attention-bearing blocks to other blocks, such as 1:5, 1:0 (all) or 0:1 (none)."""

    block_placement: Placement = "scatter"
    """Placement of the attention-bearing blocks."""

    block_mixers: str = "P:M"
    """Mixer symbol of the attention-bearing blocks and of the others, in the order of --block-ratio."""

    ffn: Literal["dense", "moe", "none"] = "dense"
    """Feed-forward layer of each block: dense (-), moe (E) or none."""

    balance_pipeline: int | None = None
    """Divide the layers into this many pipeline segments of equal work (including output head and MTP heads), instead
    of | in the pattern. Without --pipeline-model-parallel-size this is the number of stages, else a multiple of it."""

    swa_window: int = 512
    """W layers: tokens that a query sees, itself included, besides the sinks."""

    swa_sinks: int = 64
    """W layers: first tokens of the sequence, or of each packed document, that every query sees."""

    swa_rotary_base: int = 10000
    """W layers: RoPE base. W layers never use RoPE scaling."""

    mamba_a_init_range: list[float] = field(
        default_factory=lambda: [1.0, 16.0], metadata={"argparse_meta": {"nargs": 2}}
    )
    """M and P layers: range of the uniform distribution that -A starts from (the paper: 0.01 2.0)."""

    keep_last: int | None = None
    """Keep this many of the newest checkpoints; an older one is removed when a new one is complete. Default: keep
    all."""

    keep_every: int | None = None
    """With --keep-last: also keep the checkpoints of all multiples of this number."""

    load_unverified: bool = False
    """Load checkpoints without a manifest (integrity.json), from trusted read-only folders. One that differs from
    its manifest is still refused. tools/verify_checkpoint.py --seal writes a manifest."""

    allow_changed: list[str] = field(default_factory=list, metadata={"argparse_meta": {"nargs": "*"}})
    """Settings that may differ from those stored in the checkpoint although they change what a layer computes, such
    as rotary_base or swa_window; other differences are refused. Layout, batch, schedule and logging do not need it."""

    on_bad_step: Literal["stop", "skip"] = "stop"
    """What happens at a step whose loss or gradient is not finite, or whose loss jumps under --check-for-spiky-loss:
    stop ends the run with exit code 16 or 17 and saves nothing, skip continues with the next batch without an update.
    Both record the samples in bad_batches.jsonl of the --save folder (docs/faults.md)."""

    max_skipped_steps: int = 10
    """--on-bad-step skip: consecutive bad steps that may be skipped. One more stops the run."""

    spike_threshold: float = 10.0
    """--check-for-spiky-loss: the mean loss of a micro-batch is a spike if it is this many times the largest of the
    first 100 micro-batches that the process has seen."""

    hybrid_recompute: list[str] = field(
        default_factory=list, metadata={"argparse_meta": {"nargs": "*", "choices": ["ssm", "intra"]}}
    )
    """Recompute in the backward pass: the SSM core of M and P layers (ssm), whole P mixers (intra)."""


@dataclass(kw_only=True)
class IntraConfig:
    """The intra-layer hybrid (P layers). --intra-preset sets every axis; each other flag changes one."""

    intra_preset: Literal["paper", "hymba", "falcon-h1", "diff-transformer", "diff-mamba"] = "paper"
    """P layers: the design whose axes are the defaults of the flags below."""

    intra_branches: Literal["attention,mamba", "attention,attention", "mamba,mamba"] | None = field(
        default=None, metadata={"argparse_meta": {"metavar": "FIRST,SECOND"}}
    )
    """P layers: the two mixers: attention,mamba or attention,attention or mamba,mamba."""

    intra_norm: Literal["none", "group", "fused"] | None = None
    """P layers: RMSNorm of each branch's output (group), of their fusion (fused), or none."""

    intra_norm_groups: int | None = None
    """P layers: groups of channels of the norm in each branch. Default: one per head."""

    intra_scale: Literal["none", "vector", "scalar", "gate", "interpolate", "diff-lambda"] | None = None
    """P layers: factor of each branch after its norm: learned per channel (vector) or branch (scalar), computed from
    the token (gate: a sigmoid per branch; interpolate: a for the second branch and 1 - a for the first), or the
    Differential Transformer's lambda on the second branch."""

    intra_fusion: Literal["add", "diff", "concat"] | None = None
    """P layers: sum, first minus second, or concatenation."""

    intra_value: Literal["separate", "shared"] | None = None
    """P layers: shared makes both branches read one value (V of attention, x of Mamba before its convolution)."""

    intra_output: Literal["separate", "joint"] | None = None
    """P layers: an output projection per branch, before the fusion, or one after it."""

    intra_num_attention_heads: int | None = None
    """P layers: attention heads of a branch. Default: half of --num-attention-heads."""

    intra_num_query_groups: int | None = None
    """P layers: key/value heads of a branch. Default: half of --num-query-groups."""

    intra_qk_dim: int | None = None
    """P layers: query width of a branch, all heads together. Default: half of --hidden-size."""

    intra_value_dim: int | None = None
    """P layers: output width of an attention branch, all heads together. Default: --hidden-size, or --intra-ssm-dim
    if values are shared with a Mamba branch."""

    intra_ssm_dim: int | None = None
    """P layers: inner width of a Mamba branch. Default: --hidden-size."""

    intra_ssm_head_dim: int | None = None
    """P layers: head size of a Mamba branch. Default: --mamba-head-dim. Tensor-parallel ranks get whole heads."""

    intra_window: int | None = None
    """P layers: keys that a query of an attention branch sees, itself included. Default: all before it."""

    intra_sinks: int = 0
    """P layers: first tokens of the sequence, or of each packed document, that every query sees besides
    --intra-window."""
