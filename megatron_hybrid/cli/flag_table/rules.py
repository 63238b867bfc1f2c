"""Values of Megatron's flags, and their company, that would end a run.

Each rule is a condition and what the user reads. Flags that are refused with every value are in :mod:`.all_flags`.
"""

from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_hybrid.argv import flag_name, value
from megatron_hybrid.layers.registry import has_experts

SAVE_INTERVAL = 1000
"""Steps between two checkpoints of a run that does not say; there is one at its end, too."""

NO_INTERVAL = 10**9
"""Steps between two validations of a run that does not say: one at its end alone, as upstream's help has it."""

STACKS = ("hybrid_stack_spec", "mamba_stack_spec")
"""Names by which upstream's scripts ask for the stack of a pattern; ours takes its place."""

CP_COMM_TYPES = ("p2p", "a2a", "allgather", "all_gather", "a2a+p2p")

AT_LEAST_ONE = """log_interval eval_interval save_interval tensorboard_log_interval log_memory_interval
save_params_interval save_activations_interval save_tokens_per_expert_interval save_wgrads_interval save_dgrads_interval
check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval make_vocab_size_divisible_by ffn_hidden_size
moe_ffn_hidden_size num_dataset_builder_threads distributed_timeout_minutes moe_router_topk recompute_num_layers
ddp_num_buckets ddp_bucket_size num_distributed_optimizer_instances microbatch_group_size_per_vp_stage
eval_micro_batch_size eval_global_batch_size seed"""
AT_LEAST_NONE = """eval_iters exit_interval exit_duration_in_mins non_persistent_save_interval manual_gc_interval
train_sync_interval num_workers start_eval_at_iter mtp_num_layers num_experts"""
"""Here 0 is off."""

Rules = list[tuple[bool, str]]


def defaults(argv: Sequence[str]) -> list[str]:
    """Intervals for a run that gives none: upstream divides by None (training/training.py:4481), or asserts."""
    given = {word.split("=", 1)[0] for word in argv}
    added = [] if "--eval-interval" in given else ["--eval-interval", str(NO_INTERVAL)]
    if "--save" in given and given.isdisjoint(("--save-interval", "--persistent-save-interval")):
        added += ["--save-interval", str(SAVE_INTERVAL)]
    if "--skip-train" in given and given.isdisjoint(("--train-iters", "--train-samples")):
        added += ["--train-iters", "1"]  # of which data sets are built, and nothing is trained
    return added


def notes(argv: Sequence[str]) -> list[str]:
    """What the user reads of a default that decides how much work a crash costs."""
    asked = "--save-interval" in defaults(argv)
    return [f"no --save-interval: a checkpoint each {SAVE_INTERVAL:,} steps, and at the end"] if asked else []


def read_old_names(args: Namespace) -> None:
    """Carries out flags under their old names, as upstream's validation does after our checks."""
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.cuda_graph_impl == "none" and (args.enable_cuda_graph or args.external_cuda_graph):
        args.cuda_graph_impl = "local" if args.enable_cuda_graph else "transformer_engine"


def check_flags(args: Namespace, argv: list[str]) -> None:
    """Checks Megatron's parsed (not yet validated) arguments.

    Args:
        args: With ``backend`` and ``device``.
        argv: Resolved flags as the user meant them, before the backend's are added.

    Raises:
        ValueError: The first rule that is broken, with the value and the remedy.
    """
    for least, names in ((1, AT_LEAST_ONE), (0, AT_LEAST_NONE)):
        for name in names.split():
            number = getattr(args, name)
            if number is not None and number < least:
                off = " For no validation give --eval-iters 0." if name == "eval_interval" else ""
                raise ValueError(f"{flag_name(name)} is {number} and must be at least {least}.{off}")
    model = _layers(args, argv) + _experts(args) + _transformer_engine(args)
    for broken, text in model + _optimizer(args) + _logging(args) + _communication(args):
        if broken:
            raise ValueError(text)


def check_schedule(args: Namespace) -> None:
    """The length of the run and its learning rate, in upstream's units (training/training.py:1906).

    Raises:
        ValueError: A run without length or learning rate, or a schedule that upstream's asserts would end.
    """
    if args.skip_train:
        return
    if not args.train_iters and not args.train_samples:
        raise ValueError("The run has no length: give --train-iters N, or --train-samples N, of at least 1.")
    if args.lr is None:
        raise ValueError("--lr is not given: a run without --recipe needs a learning rate, such as 1e-3.")
    for broken, text in [*_learning_rate(args), *_weight_decay(args)]:
        if broken:
            raise ValueError(text)


def _learning_rate(args: Namespace) -> Rules:
    unit = "samples" if args.train_samples else "iters"
    decay = getattr(args, f"lr_decay_{unit}")
    decay = (args.train_samples or args.train_iters) if decay is None else decay
    warmup, flag = getattr(args, f"lr_warmup_{unit}"), f"--lr-warmup-{unit} is"
    if args.lr_warmup_fraction is not None:
        warmup, flag = args.lr_warmup_fraction * decay, f"--lr-warmup-fraction {args.lr_warmup_fraction:g} is"
    return [
        (
            0 < (args.train_samples or 0) < (args.global_batch_size or 0),
            f"--train-samples {args.train_samples} is less than a step of --global-batch-size "
            f"{args.global_batch_size}: give more samples.",
        ),
        (
            not (0 <= args.min_lr <= args.lr and 0 <= args.lr_warmup_init <= args.lr),
            f"--lr {args.lr:g} --min-lr {args.min_lr:g} --lr-warmup-init {args.lr_warmup_init:g}: the last two lie "
            "between 0 and the first.",
        ),
        (decay < 1, f"--lr-decay-{unit} is {decay} and must be at least 1."),
        (
            not 0 <= warmup < max(decay, 1),
            f"{flag} {warmup:g} of {decay} {unit}: warm-up ends before the schedule of the learning rate does "
            f"(--lr-decay-{unit}, by default the whole run). Make it shorter.",
        ),
        (
            args.phase_transition_iterations is not None and not args.train_samples,
            "--phase-transition-iterations needs --train-samples in place of --train-iters.",
        ),
        (
            args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None,
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: how long it cools down at the end.",
        ),
        (
            args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler,
            "--override-opt-param-scheduler takes the schedule of the flags, --use-checkpoint-opt-param-scheduler that "
            "of the checkpoint: drop one.",
        ),
    ]


def _weight_decay(args: Namespace) -> Rules:
    start, end = args.start_weight_decay, args.end_weight_decay
    growing = args.weight_decay_incr_style != "constant"
    return [
        (
            growing and not 0 <= (-1 if start is None else start) <= (-1 if end is None else end),
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and "
            f"--end-weight-decay with 0 <= start <= end; they are {start} and {end}.",
        ),
        (
            not growing and (start, end) != (None, None),
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine: a constant "
            "one is --weight-decay.",
        ),
    ]


def _layers(args: Namespace, argv: list[str]) -> Rules:
    layers, heads, old = args.hybrid_layer_pattern, args.mtp_num_layers, args.mtp_hybrid_override_pattern
    dtype = args.mamba_training_ssm_states_dtype
    return [
        (
            bool(args.spec) and args.spec[-1] not in STACKS,
            f"--spec {' '.join(args.spec or [])}: the layers come from the pattern, and their implementation from "
            "--backend. Drop it.",
        ),
        (
            value(argv, "--transformer-impl") == "inference_optimized",
            "--transformer-impl inference_optimized is for inference: use --backend te or torch.",
        ),
        (
            args.transformer_impl == "local" and args.backend == "te",
            "--transformer-impl local and --backend te contradict each other: drop one.",
        ),
        (
            args.attention_backend.name == "local",
            "--attention-backend local is GPT's: attention without Transformer Engine is --backend torch.",
        ),
        (
            old is not None and not heads,
            "--mtp-hybrid-override-pattern without --mtp-num-layers adds no heads: write them into the pattern, such "
            "as M-*-/M- for one.",
        ),
        (
            bool(heads) and "/" not in layers and old is None,
            f"--mtp-num-layers {heads}, and the pattern {layers} has no prediction heads: add one /LAYERS for each, "
            "such as M-*-/M-, or drop it.",
        ),
        (
            args.tokenizer_type in ("MultimodalTokenizer", "NullMultimodalTokenizer", "SFTTokenizer"),
            f"--tokenizer-type {args.tokenizer_type} belongs to another program of Megatron's: take one of text.",
        ),
        (
            0 < (args.padded_vocab_size or 0) < (args.vocab_size or 0),
            f"--padded-vocab-size {args.padded_vocab_size} is less than --vocab-size {args.vocab_size}.",
        ),
        (
            dtype is not None and not _scan_has_state_dtype(),
            f"--mamba-training-ssm-states-dtype {dtype}: the scan in use has no such choice (torch's keeps fp32, and "
            "mamba_ssm may be too old). Drop it.",
        ),
    ]


def _experts(args: Namespace) -> Rules:
    experts = has_experts(args.hybrid_layer_pattern)
    biases = experts and args.add_bias_linear
    flex = experts and args.moe_token_dispatcher_type == "flex"
    module = "transformer_engine" if args.moe_flex_dispatcher_backend == "ncclep" else "deep_ep"
    return [
        (
            experts and bool(args.num_experts) and args.moe_router_topk > args.num_experts,
            f"--moe-router-topk {args.moe_router_topk} is more than --num-experts {args.num_experts}.",
        ),
        (
            flex and not _installed(module),
            f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {args.moe_flex_dispatcher_backend} "
            f"needs the package {module}, which is not installed: use alltoall.",
        ),
        (
            biases and args.moe_shared_expert_intermediate_size is not None,
            "Shared experts have no biases in Megatron: add --disable-bias-linear.",
        ),
        (
            biases and args.backend == "torch",
            "Experts of --backend torch have no biases: add --disable-bias-linear.",
        ),
    ]


def _transformer_engine(args: Namespace) -> Rules:
    """What the layers, and Megatron's own parts, do with the help of Transformer Engine alone."""
    layers = (
        "use_te_activation_func",
        "use_transformer_engine_op_fuser",
        "te_precision_config_file",
        "tp_comm_overlap",
        "save_activations_interval",
        "save_dgrads_interval",
        "use_grouped_gemm_for_shared_expert",
        "moe_mlp_glu_interleave_size",
        "moe_shared_expert_glu_interleave_size",
        "tensor_parallel_num_weight_shards",
        "expert_tensor_parallel_num_weight_shards",
    )
    elsewhere = ("te_rng_tracker", "moe_router_fusion", "use_precision_aware_optimizer")
    missing = not _installed("transformer_engine")
    alone = [name for name in layers if args.backend == "torch"] + [name for name in elsewhere if missing]
    return [
        (
            getattr(args, name) not in (None, False),
            f"{flag_name(name)} needs Transformer Engine: use --backend te on CUDA where it is installed, or drop it.",
        )
        for name in alone
    ]


def _optimizer(args: Namespace) -> Rules:
    dtypes = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    smaller = next((name for name in dtypes if getattr(args, name) != "fp32"), dtypes[0])
    precise = args.use_precision_aware_optimizer
    return [
        (
            args.optimizer not in ("adam", "sgd") and not _installed("emerging_optimizers"),
            f"--optimizer {args.optimizer} needs the package emerging-optimizers, which is not installed: use adam or "
            "sgd.",
        ),
        (
            args.optimizer == "sgd" and args.use_distributed_optimizer,
            "--optimizer sgd cannot be combined with --use-distributed-optimizer, which takes Adam: drop one.",
        ),
        (
            args.ckpt_format == "torch" and args.use_distributed_optimizer and not (args.bf16 or args.fp16),
            "--ckpt-format torch: in fp32 Megatron cannot load the state of --use-distributed-optimizer from it. Drop "
            "one.",
        ),
        (
            getattr(args, smaller) != "fp32" and not precise,
            f"{flag_name(smaller)} {getattr(args, smaller)} needs --use-precision-aware-optimizer (and Transformer "
            "Engine): drop it.",
        ),
        (
            precise and not args.use_distributed_optimizer,
            "--use-precision-aware-optimizer needs --use-distributed-optimizer: add it, or drop the first.",
        ),
        (
            args.optimizer_cpu_offload and not precise,
            "--optimizer-cpu-offload needs --use-precision-aware-optimizer (and Transformer Engine): drop it.",
        ),
    ]


def _logging(args: Namespace) -> Rules:
    """Logs, profiles, signals and other settings around the training."""
    cpu, signal = args.device == "cpu", args.exit_signal.name
    faults = bool(args.fault_injector_ranks or args.fault_injector_num_ranks)
    kept = [f"save_{what}_interval" for what in ("params", "activations", "wgrads", "dgrads", "tokens_per_expert")]
    kept = [name for name in kept if getattr(args, name) is not None]
    cached = next(
        (n for n in ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap") if getattr(args, n)), ""
    )
    packages = (
        ("wandb_project", bool(args.wandb_project), "wandb", "wandb"),
        ("log_straggler", args.log_straggler, "pynvml", "nvidia-ml-py"),
        ("log_device_memory_used", args.log_device_memory_used, "pynvml", "nvidia-ml-py"),
        ("fault_injector_ranks", faults, "nvidia_resiliency_ext", "nvidia-resiliency-ext"),
    )
    needs = [
        (
            asked and not _installed(module),
            f"{flag_name(name)} needs the package {package}, which is not installed: drop it.",
        )
        for name, asked, module, package in packages
    ]
    return [
        *needs,
        (
            args.dist_ckpt_strictness in ("raise_all", "return_all", "return_unexpected"),
            f"--dist-ckpt-strictness {args.dist_ckpt_strictness} ends every load in this Megatron: use "
            "raise_unexpected, or log_all.",
        ),
        (
            bool(args.wandb_project) and not (args.wandb_save_dir or args.save),
            "--wandb-project needs --wandb-save-dir, or --save, to write to.",
        ),
        (bool(kept) and not args.save, f"{flag_name(kept[0]) if kept else ''} needs --save FOLDER to write to."),
        (
            bool(cached) and args.mock_data,
            f"{flag_name(cached)} reads indices of real data, and --mock-data has none: drop one.",
        ),
        (
            bool(cached) and args.data_cache_path is None,
            f"{flag_name(cached)} needs --data-cache-path FOLDER, with the indices of an earlier run: add it.",
        ),
        (
            signal in ("SIGKILL", "SIGSTOP"),
            f"--exit-signal {signal}: no process can catch it. Take another, such as SIGUSR1.",
        ),
        (
            cpu and args.profile and not args.use_pytorch_profiler,
            "--profile alone is for Nsight Systems on CUDA: add --use-pytorch-profiler, or drop it.",
        ),
        (cpu and args.record_memory_history, "--record-memory-history records a GPU's memory: drop it."),
        (
            cpu and args.gpu_sniff_test_interval is not None,
            "--gpu-sniff-test-interval runs matrix products of a GPU's size: drop it.",
        ),
    ]


def _communication(args: Namespace) -> Rules:
    size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    replicas = args.world_size // max(1, size)
    instances, settings = args.num_distributed_optimizer_instances, args.nccl_communicator_config_path
    on_gpus = ("pipeline_model_parallel_comm_backend", "use_sharp", "nccl_ub", "nccl_communicator_config_path")
    asked = next((name for name in on_gpus if getattr(args, name)), "")
    return [
        (
            args.device == "cpu" and bool(asked),
            f"{flag_name(asked.replace('nccl_ub', 'use_nccl_ub'))} is for GPUs: the CPU engine communicates over gloo. "
            "Drop it.",
        ),
        (
            settings is not None and not Path(settings or "").is_file(),
            f"--nccl-communicator-config-path {settings}: there is no such file.",
        ),
        (
            args.sharp_enabled_group is not None and not args.use_sharp,
            "--sharp-enabled-group needs --use-sharp: add it, or drop the first.",
        ),
        (
            bool(replicas % instances),
            f"--num-distributed-optimizer-instances {instances} does not divide the {replicas} model replicas: change "
            "it, or the number of processes.",
        ),
        (
            not set(args.cp_comm_type) <= set(CP_COMM_TYPES),
            f"--cp-comm-type {' '.join(args.cp_comm_type)}: choose from {', '.join(CP_COMM_TYPES)}.",
        ),
    ]


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _scan_has_state_dtype() -> bool:
    from megatron.core.ssm import mamba_mixer

    return bool(mamba_mixer.MAMBA_HAS_STATE_DTYPE)
