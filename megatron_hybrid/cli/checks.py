"""Rules for models and layouts, checked before anything is built."""

import math
from argparse import Namespace

from megatron_hybrid import pattern
from megatron_hybrid.accounting.divisibility import check_divides
from megatron_hybrid.accounting.loss_chunks import NEEDS_LOGITS
from megatron_hybrid.argv import flag_name
from megatron_hybrid.cli import fp8_checks
from megatron_hybrid.layers.registry import layers_of


def check(args: Namespace) -> None:
    """Checks Megatron's parsed (not yet validated) arguments.

    Raises:
        ValueError: The first rule that is broken, with the values and the remedy.
    """
    pattern.parse(args.hybrid_layer_pattern)
    check_sizes(args)
    check_world(args)
    check_batch(args)
    check_positions(args)
    check_unsupported(args)
    check_bad_steps(args)
    for layer in layers_of(args.hybrid_layer_pattern):
        layer.check(args)
    if args.fp8:
        fp8_checks.check(args)


def check_sizes(args: Namespace) -> None:
    """The sizes that every model and layout needs."""
    for name in ("hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings"):
        if getattr(args, name) is None:
            raise ValueError(f"{flag_name(name)} is not given: a run without --recipe needs it.")
    parallel = [f"{kind}_parallel_size" for kind in ("tensor_model", "context", "expert_model", "expert_tensor")]
    for name in (
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "vocab_size",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_state_dim",
        *parallel,
    ):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"{flag_name(name)} is {value} and must be at least 1.")
    for name in ("train_iters", "train_samples"):
        value = getattr(args, name, None)
        if value is not None and value < 0:
            raise ValueError(f"{flag_name(name)} is {value} and must be at least 0.")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise ValueError(f"--peak-tflops is {args.peak_tflops:g}: give a GPU's dense peak in TFLOP/s, such as 989.")


def check_world(args: Namespace) -> None:
    """The number of processes against the layout."""
    pp, cp, ep = args.pipeline_model_parallel_size, args.context_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or _tp(args)
    layouts = {
        f"model replicas (tensor {_tp(args)} x pipeline {pp} x context {cp})": _tp(args) * pp * cp,
        f"replicas of the experts (expert {ep} x expert tensor {etp} x pipeline {pp})": ep * etp * pp,
    }
    for what, size in layouts.items():
        if args.world_size % size:
            raise ValueError(
                f"{args.world_size} processes do not divide into {what} of {size}: start a multiple of {size} with "
                "torchrun --nproc_per_node, or make the layout smaller."
            )
    if ep > 1 and args.num_experts:
        check_divides(args.num_experts, "--num-experts", ep, "--expert-model-parallel-size")


def check_batch(args: Namespace) -> None:
    """The batch against the replicas. A batch that grows, and one below 1, are Megatron's to check."""
    if args.micro_batch_size is None:
        raise ValueError("--micro-batch-size is not given: a run without --recipe needs it, such as 1.")
    replicas = args.world_size // (_tp(args) * args.pipeline_model_parallel_size * args.context_parallel_size)
    batch = args.micro_batch_size * replicas
    free = args.step_batch_size_schedule or args.decrease_batch_size_if_needed
    if args.global_batch_size and not free and batch > 0 and args.global_batch_size % batch:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} times {replicas} model replicas: change one of them, or the number of processes."
        )
    if batch > 0 and args.global_batch_size and not args.step_batch_size_schedule:
        _check_micro_batches(args, args.global_batch_size // batch, "--global-batch-size and --micro-batch-size")
    evaluated = args.eval_global_batch_size or args.global_batch_size
    at_once = (args.eval_micro_batch_size or args.micro_batch_size) * replicas
    if evaluated and at_once > 0 and (args.eval_global_batch_size or args.eval_micro_batch_size):
        names = "--eval-global-batch-size and --eval-micro-batch-size"
        if evaluated % at_once:
            raise ValueError(
                f"{names}: {evaluated} samples are not a multiple of {at_once // replicas} times {replicas} model "
                "replicas: change one of them, or the number of processes."
            )
        _check_micro_batches(args, evaluated // at_once, names)


def _check_micro_batches(args: Namespace, count: int, names: str) -> None:
    """The rule of interleaved stages (core/pipeline_parallel/schedules.py:1145), which upstream checks in the step."""
    pp = args.pipeline_model_parallel_size
    segments = args.hybrid_layer_pattern.split("/")[0].count("|") + 1
    if pp == 1 or segments <= pp:
        return
    group = args.microbatch_group_size_per_vp_stage or pp
    if 0 < count % group < pp:
        raise ValueError(
            f"{names} give {count} micro-batches on each model replica, and with virtual pipeline stages their "
            f"remainder by {group} must be 0 or at least --pipeline-model-parallel-size {pp}: change the batch, or "
            "drop the virtual stages."
        )


def smallest_world(args: Namespace) -> int:
    """The fewest processes that the layout fits."""
    pp, cp, ep = args.pipeline_model_parallel_size, args.context_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or _tp(args)
    return math.lcm(_tp(args) * pp * cp, ep * etp * pp)


def check_positions(args: Namespace) -> None:
    """Position flags are translated for each layer's own RoPE, or refused."""
    kind = args.position_embedding_type
    if kind not in ("rope", "none"):
        raise ValueError(
            f"--position-embedding-type {kind}: hybrid layers take rope (each attention layer has its own "
            "table) or none. Add --position-embedding-type rope."
        )
    if kind == "none" and args.use_rope_scaling:
        raise ValueError("--use-rope-scaling with --position-embedding-type none: there is no RoPE to scale. Drop one.")
    if args.use_rope_scaling and args.rope_scaling_factor < 1:
        raise ValueError(f"--rope-scaling-factor is {args.rope_scaling_factor} and must be at least 1.")


def check_unsupported(args: Namespace) -> None:
    """Values of upstream's flags that our layers would ignore, or that need what is not installed.

    Flags that are refused with every value are in cli/flag_table/.
    """
    check_packing(args)
    own_norms = any(layer.own_norm for layer in layers_of(args.hybrid_layer_pattern))
    if args.layernorm_zero_centered_gamma and (args.backend == "torch" or own_norms):
        raise ValueError(
            "--apply-layernorm-1p is not supported by the torch layers and P layers: their norms are plain."
        )
    if args.softmax_type != "vanilla":
        raise ValueError(f"--softmax-type {args.softmax_type} is not supported: sinks are W layers. Drop it.")
    graphs = args.cuda_graph_impl != "none" or args.optimizer_cuda_graph
    if args.device == "cpu" and graphs:
        raise ValueError("--cuda-graph-impl and --optimizer-cuda-graph need a CUDA device. Drop them.")
    modules = set(args.recompute_modules or []) - {"core_attn", "mlp", "moe", "shared_experts"}
    if args.backend == "torch" and args.recompute_granularity == "selective" and modules:
        raise ValueError(
            f"--recompute-modules {' '.join(sorted(modules))} needs Transformer Engine (upstream frees these outputs "
            "with its help): use core_attn, mlp, moe or shared_experts, --hybrid-recompute ssm intra, or "
            "--recompute-granularity full."
        )
    if args.backend == "torch" and (args.fp8 or getattr(args, "fp4", None)):
        raise ValueError("--fp8-format / --fp4-format need Transformer Engine: use --backend te on a CUDA device.")
    if args.loss_kernel == "fused":
        for name, why in NEEDS_LOGITS.items():
            if getattr(args, name):
                raise ValueError(f"--loss-kernel fused cannot be combined with {flag_name(name)}: {why}. Drop one.")
    if args.normalization != "RMSNorm":
        raise ValueError(
            f"--normalization {args.normalization}: hybrid layers use RMSNorm; add --normalization RMSNorm."
        )


def check_bad_steps(args: Namespace) -> None:
    """What is done at bad steps (training/bad_steps.py)."""
    if args.max_skipped_steps < 0:
        raise ValueError(f"--max-skipped-steps is {args.max_skipped_steps} and must be at least 0.")
    if not args.spike_threshold > 1:
        raise ValueError(
            f"--spike-threshold is {args.spike_threshold:g} and must be above 1: it is a multiple of the largest loss "
            "of the first 100 micro-batches."
        )
    if args.rerun_mode == "report_stats":
        raise ValueError("--rerun-mode report_stats is not supported: this Megatron fails with it. Drop it.")
    if args.on_bad_step == "skip":
        for name, why in (
            ("fp16", "its loss scaling already skips non-finite steps"),
            ("optimizer_cuda_graph", "a captured update cannot be skipped"),
        ):
            if getattr(args, name):
                raise ValueError(f"--on-bad-step skip cannot be combined with {flag_name(name)}: {why}. Drop one.")


def check_packing(args: Namespace) -> None:
    """Packed documents that are kept apart: what the layers can, and what they cannot."""
    if not args.reset_attention_mask:
        if args.reset_position_ids:
            raise ValueError(
                "--reset-position-ids alone changes nothing: RoPE sees how far tokens are apart, not where a document "
                "begins. Add --reset-attention-mask, which keeps packed documents apart, or drop it."
            )
        return
    dropped_on_cuda = args.device == "cuda" and args.attention_dropout
    carry = [layer.symbol for layer in layers_of(args.hybrid_layer_pattern) if not layer.keeps_documents_apart]
    refused = (
        (bool(carry), f"{' '.join(carry)} layers", "they carry their state over boundaries: use M layers"),
        (args.cuda_graph_impl != "none", "--cuda-graph-impl", "captured layers do not support boundaries: drop it"),
        (
            not args.use_mamba_mem_eff_path,
            "--disable-mamba-mem-eff-path",
            "that path does not support boundaries: drop it",
        ),
        (dropped_on_cuda, "--attention-dropout", "the fused kernel has none: set it to 0"),
    )
    for wrong, what, why in refused:
        if wrong:
            raise ValueError(f"--reset-attention-mask cannot be combined with {what}: {why}.")


def _tp(args: Namespace) -> int:
    return args.tensor_model_parallel_size
