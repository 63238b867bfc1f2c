"""Upstream code that is relied on for building and running models."""

from tests.patches.contract import (
    ADAM,
    ALLOCATION,
    DELTA,
    DISPATCHER,
    LANGUAGE,
    LINEARS,
    MAPPINGS,
    MIXER,
    MTP,
    ROUTER,
    ROUTER_LOG,
    TRAINING,
    Contract,
)

_C = Contract
CONTRACTS = [
    _C("register_symbols", ALLOCATION, "Symbols", holds=("VALID_LAYERS = {",), lacks=("'P'", "'W'")),
    _C("register_symbols", ALLOCATION, "Symbols.name_sorted_valid_layer_symbols", holds=("vars(cls).items()",)),
    _C("skip_helper_compilation", "core/datasets/utils.py", "compile_helpers", "", ("['make', '-C'", "sys.exit(1)")),
    _C(
        "skip_helper_compilation",
        "training/initialize.py",
        holds=("from megatron.core.datasets.utils import compile_helpers\n", "compile_helpers()"),
    ),
    _C(
        "build_mtp_from_our_stack",
        MTP,
        "MultiTokenPredictionLayer.__init__",
        holds=(
            "from megatron.core.models.hybrid.hybrid_block import HybridStack\n",
            "self.mtp_model_layer = HybridStack(config=self.config, submodules=hybrid_submodules, "
            "layer_type_list=validate_segment_layers(mtp_layer_pattern), pp_layer_offset=0, pre_process=True, "
            "post_layer_norm=False, post_process=True, pg_collection=pg_collection, is_mtp_layer=True, name=",
        ),
    ),
    _C(
        "build_our_model",
        "training/models/hybrid.py",
        holds=(
            "from megatron.core.models.hybrid.hybrid_model import HybridModel\n",
            "return HybridModel(config=self._model_config.transformer, hybrid_stack_spec=hybrid_stack_spec, vocab",
        ),
    ),
    _C(
        "build_our_model",
        "core/models/hybrid/hybrid_model.py",
        "HybridModel.forward",
        holds=(
            "def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, decoder_input: Tensor="
            "None, labels: Tensor=None, inference_context",
            "logits, _ = self.output_layer(hidden_states, weight=output_weight, runtime_gather_output=",
            "logits = self._scale_logits(logits)\n",
            "loss = self.compute_language_model_loss(labels, logits)\n",
            "compute_language_model_loss=self.compute_language_model_loss",
        ),
    ),
    _C(
        "build_our_model",
        "core/models/hybrid/hybrid_model.py",
        "HybridModel.__init__",
        holds=(
            "self.output_layer = tensor_parallel.ColumnParallelLinear(config.hidden_size, self.vocab_size, config=",
            "bias=False, skip_bias_add=False, gather_output=not self.parallel_output, skip_weight_param_allocation=",
        ),
    ),
    _C("build_our_model", LANGUAGE, "LanguageModule._scale_logits", holds=("if not self.config.use_mup:\n",)),
    _C(
        "build_our_model",
        MTP,
        "process_mtp_loss",
        holds=(
            "mtp_logits, _ = output_layer(hidden_states_list[mtp_layer_number + 1], weight=output_weight, ",
            "mtp_loss = compute_language_model_loss(mtp_labels, mtp_logits)",
            "_compute_mtp_acceptance_counts(mtp_logits, mtp_labels, loss_mask, output_layer, ",
        ),
    ),
    _C(
        "build_our_model",
        MTP,
        "_compute_mtp_acceptance_counts",
        holds=(
            "preds = _vocab_parallel_argmax(mtp_logits, tp_group, tp_size)",
            "preds = torch.argmax(mtp_logits, dim=-1)",
        ),
    ),
    _C(
        "build_our_model",
        MTP,
        "_vocab_parallel_argmax",
        "vocab_parallel_logits tp_group tp_size",
        (
            "vocab_shard_size = vocab_parallel_logits.size(-1)",
            "local_max_vals, local_argmax = vocab_parallel_logits.max(dim=-1)",
        ),
    ),
    _C(
        "shift_tokens_inside_documents",
        MTP,
        "_roll_tensor_packed_seq",
        "tensor shifts dims packed_seq_params cp_group",
        ("cu_seqlens = packed_seq_params.cu_seqlens_q\n", "rolled_seq[..., shifts:] = 0"),
        lacks=("seq_idx",),
    ),
    _C(
        "shift_tokens_inside_documents",
        MTP,
        "roll_tensor",
        "tensor shifts dims cp_group packed_seq_params",
        (
            "if packed_seq_params is not None:\n",
            "return _roll_tensor_packed_seq(tensor, shifts, dims, packed_seq_params, cp_group)",
        ),
    ),
    _C(
        "build_mtp_from_our_stack",
        "core/models/hybrid/hybrid_block.py",
        "HybridStack.__init__",
        "self config submodules pre_process layer_type_list pp_layer_offset post_layer_norm post_process device dtype "
        "pg_collection is_mtp_layer name",
    ),
    _C(
        "sum_shared_gradients",
        "core/distributed/finalize_model_grads.py",
        "_allreduce_non_tensor_model_parallel_grads",
        "model config tp_group",
        (
            "config.sequence_parallel and getattr(param, 'sequence_parallel', False) or (config.qk_layernorm",
            "params_sum.append(param)",
        ),
    ),
    _C(
        "sum_shared_gradients",
        "core/distributed/finalize_model_grads.py",
        "finalize_model_grads",
        holds=("_allreduce_non_tensor_model_parallel_grads(model, config, tp_group)",),
    ),
    _C(
        "use_torch_mamba_kernels",
        MIXER,
        "MambaMixer._ssm_training",
        "self zxBCdt packed_seq_params",
        (
            "mamba_split_conv1d_scan_combined(zxBCdt, rearrange(self.cp.get_conv1d_weight(), 'd 1 w -> d w'), "
            "self.cp.get_conv1d_bias(), self.cp.get_dt_bias().float(), A, D=",
            "if MAMBA_HAS_STATE_DTYPE else {}",
            "chunk_size=self.chunk_size, activation=self.activation, headdim=",
            "ngroups=self.cp.ngroups_local_tpcp, norm_before_gate=self.norm_before_gate, seq_idx=seq_idx",
        ),
    ),
    _C(
        "use_torch_mamba_kernels",
        MIXER,
        "ExtendedRMSNorm.sharded_state_dict",
        "self prefix sharded_offsets metadata",
        ("{'weight': 0}",),
    ),
    _C(
        "use_torch_mamba_kernels",
        MIXER,
        "_check_mamba_sequence_packing_support",
        "for_inference_not_training",
        ("return (True, None)",),
    ),
    _C(
        "use_torch_mamba_kernels",
        MIXER,
        holds=("if not HAVE_MAMBA_SSM:\n", "RMSNormGated = MagicMock()", "causal_conv1d_fn = None"),
    ),
    _C("use_torch_gated_delta_rule", f"{DELTA}/common.py", holds=("if not HAVE_FLA:\n", "l2norm = None")),
    _C(
        "use_torch_gated_delta_rule",
        f"{DELTA}/common.py",
        "torch_chunk_gated_delta_rule",
        "q k v g beta chunk_size initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens",
    ),
    _C(
        "use_torch_gated_delta_rule",
        f"{DELTA}/gdn.py",
        holds=("if self.config.deterministic_mode:\n", "self.gated_delta_rule = torch_chunk_gated_delta_rule"),
    ),
    _C(
        "use_fused_adam_contract",
        ADAM,
        holds=("from torch.optim import Adam as Adam\n", "HAVE_APEX_OR_TE = False", "USING_APEX_OPTIMIZER = True"),
    ),
    _C("use_fused_adam_contract", ADAM, "DistributedOptimizer.load_state_dict", holds=("s['step'] = step",)),
    _C(
        "use_fused_adam_contract",
        "core/optimizer/__init__.py",
        holds=("if USING_PYTORCH_OPTIMIZER:\n", "kwargs['adam_w_mode'] = config.decoupled_weight_decay"),
    ),
    _C(
        "give_all_to_all_its_splits",
        "core/transformer/moe/moe_utils.py",
        "maybe_move_tensor_to_cpu",
        "tensor as_numpy record_stream",
        ("if torch.is_tensor(tensor) and tensor.is_cuda:\n",),
    ),
    _C(
        "give_all_to_all_its_splits",
        DISPATCHER,
        holds=("self.input_splits = maybe_move_tensor_to_cpu(self.input_splits, as_numpy=True",),
    ),
    _C(
        "gather_unequal_parts",
        MAPPINGS,
        "_gather_along_first_dim",
        "input_ group output_split_sizes use_global_buffer",
        ("torch.distributed.all_gather(output_tensor_list, input_, group=group)",),
    ),
    _C(
        "reduce_scatter_unequal_parts",
        MAPPINGS,
        "_reduce_scatter_along_first_dim",
        "input_ group input_split_sizes use_global_buffer",
        ("torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",),
    ),
    _C(
        "tie_output_layers_of_heads",
        "core/models/hybrid/hybrid_model.py",
        "HybridModel.__init__",
        holds=(
            "skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights",
            "self.setup_embeddings_and_output_layer()",
        ),
    ),
    _C(
        "tie_output_layers_of_heads",
        LANGUAGE,
        "LanguageModule.shared_embedding_or_output_weight",
        holds=("if self.pre_process or getattr(self, 'mtp_process', False):",),
    ),
    _C(
        "tie_output_layers_of_heads",
        LANGUAGE,
        "LanguageModule.setup_embeddings_and_output_layer",
        holds=(
            "if self.config.pipeline_model_parallel_size == 1:\n        self.shared_embedding_or_output_weight()"
            ".zero_out_wgrad = True\n        return",
        ),
    ),
    _C(
        "log_router_losses_of_all_layers",
        ROUTER_LOG,
        "MoEMetricsTracker.record",
        "self name value layer_number num_layers reduce_group avg_group needs_dp_avg",
        ("MetricEntry(values=torch.zeros(num_layers, device=value.device))",),
    ),
    _C(
        "log_router_losses_of_all_layers",
        ROUTER_LOG,
        "MoEMetricsTracker._sync_metrics",
        holds=("torch.distributed.all_reduce(v, group=pp_group)", "if entry.reduce_group is not None:"),
    ),
    _C(
        "log_router_losses_of_all_layers",
        ROUTER_LOG,
        "MoEMetricsTracker._count_moe_layers",
        holds=("if moe_layer_freq is None:\n        n = num_layers", "n += mtp_num_layers"),
    ),
    _C(
        "log_router_losses_of_all_layers",
        TRAINING,
        "training_log",
        holds=(
            "layers = itemgetter(Symbols.MOE)(get_hybrid_layer_counts(args.hybrid_layer_pattern))",
            "get_moe_metrics_tracker().report(loss_scale=moe_loss_scale, iteration=iteration,",
            "force_initialize=True, track_names=track_names, num_layers=layers,",
            "if 'aux_loss' in args.moe_router_load_balancing_type:",
        ),
    ),
    _C(
        "number_routers_of_heads",
        ROUTER,
        "TopKRouter.attach_and_log_load_balancing_loss",
        holds=("layer_number = self.layer_number + self.config.num_layers", "reduce_group=reduce_group, needs_dp_avg="),
    ),
    _C("number_routers_of_heads", ROUTER, "TopKRouter.apply_z_loss", holds=("avg_group=self.tp_dp_cp_group)",)),
    _C(
        "count_tokens_of_experts",
        ROUTER,
        "TopKRouter._apply_expert_bias",
        "self routing_map padding_mask",
        (
            "if self.enable_expert_bias and torch.is_grad_enabled():\n",
            "routing_map = routing_map & ~padding_mask\n",
            "self.local_tokens_per_expert += routing_map.sum(dim=0)",
        ),
    ),
    _C(
        "count_tokens_of_experts",
        ROUTER,
        "TopKRouter.routing",
        holds=("self._apply_expert_bias(routing_map, padding_mask=padding_mask)\n    return (probs, routing_map)",),
    ),
    _C("routers", ROUTER, "Router.set_layer_number", "self layer_number", ("self.layer_number = layer_number",)),
    _C("routers", MTP, holds=("self.layers = torch.nn.ModuleList([shared_layer])", "self.mtp_model_layer = ")),
    _C(
        "meta_device",
        "core/tensor_parallel/layers.py",
        "ColumnParallelLinear.__init__",
        holds=("device=torch.cuda.current_device()",),
    ),
    _C("meta_device", MIXER, "MambaMixer.__init__", holds=("device=torch.cuda.current_device()",)),
    _C(
        "count_tokens_of_context_parallel_heads",
        MTP,
        "process_mtp_loss",
        holds=(
            "loss_mask, num_tokens = roll_tensor(loss_mask, shifts=-1, dims=-1, cp_group=cp_group, "
            "packed_seq_params=packed_seq_params)",
            "original_num_tokens = loss_mask.sum()",
            "mtp_loss_scale * mtp_loss * (original_num_tokens / num_tokens_safe)",
            "mtp_loss_scale * mtp_loss / safe_num_tokens",
            "torch.sum(mtp_loss) * (num_tokens > 0).to(mtp_loss.dtype) / num_tokens.clamp(min=1)",
        ),
    ),
    _C(
        "count_tokens_of_context_parallel_heads",
        MTP,
        "roll_tensor",
        "tensor shifts dims cp_group packed_seq_params",
        ("return (rolled_tensor, rolled_tensor.sum())",),
    ),
    _C(
        "size_by_largest_id",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.vocab_size",
        "self",
        ("return len(self.tokenizer)",),
    ),
    _C(
        "the CPU engine",
        "core/tensor_parallel/random.py",
        "CudaRNGStatesTracker.fork",
        "self name",
        ("cpu_rng_state = torch.get_rng_state()",),
    ),
    _C(
        "the CPU engine",
        "core/optimizer/optimizer.py",
        holds=("'torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor'", "'torch.cuda.FloatTensor'"),
    ),
    _C(
        "log_router_losses_of_all_layers",
        ROUTER_LOG,
        "MoEMetricsTracker.report",
        holds=("self._sync_metrics(", "self._count_moe_layers("),
    ),
    _C(
        "accumulate_in_products",
        LINEARS,
        "LinearWithGradAccumulationAndAsyncCommunication.forward",
        holds=("if gradient_accumulation_fusion and hasattr(weight, 'main_grad'):",),
    ),
    _C(
        "accumulate_in_products",
        LINEARS,
        "LinearWithGradAccumulationAndAsyncCommunication.backward",
        "ctx grad_output",
        (
            "wgrad_gemm_accum_fp32(total_input, grad_output, weight.main_grad)",
            "wgrad_gemm_accum_fp16(total_input, grad_output, weight.main_grad)",
            # of a padded weight, which has no such attribute, the gradient is None
            "if hasattr(weight, 'grad_added_to_main_grad'):",
            "else:\n            grad_weight = None",
            "if getattr(weight, 'zero_out_wgrad', False):",
        ),
    ),
    _C(
        "accumulate_in_products",
        LINEARS,
        "linear_with_grad_accumulation_and_async_allreduce",
        "input weight bias gradient_accumulation_fusion allreduce_dgrad sequence_parallel grad_output_buffer "
        "wgrad_deferral_limit tp_group gtp_remat_size",
        ("linear_with_grad_accumulation_and_async_allreduce.warned = True",),
    ),
    _C(
        "accumulate_in_products",
        LINEARS,
        "ColumnParallelLinear.forward",
        holds=(
            "self._forward_impl(input=input_parallel, weight=weight, bias=bias, gradient_accumulation_fusion="
            "self.gradient_accumulation_fusion",
        ),
    ),
    _C(
        "accumulate_in_products",
        LINEARS,
        holds=("_grad_accum_fusion_available = True\ntry:\n    import fused_weight_gradient_mlp_cuda\n",),
    ),
    _C(
        "accumulate_in_products",
        "core/distributed/distributed_data_parallel.py",
        holds=(
            "if param.grad is not None and (not param.grad_added_to_main_grad or getattr(param, 'zero_out_wgrad', "
            "False)):",
            "param.grad_added_to_main_grad = False",
        ),
    ),
    _C("postpone", "core/timers.py", holds=("import wandb",)),
]
