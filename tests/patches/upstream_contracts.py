"""What each reach of engine/ relies on in the source of megatron-core, as it was when the reach was written.

Read as text, so that the check runs before any of it is replaced, and takes no import of Megatron.
"""

import ast
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

UPSTREAM = Path(str(metadata.distribution("megatron-core").locate_file("megatron")))
VERSION = "0.19.2"

ALLOCATION = "core/models/hybrid/hybrid_layer_allocation.py"
MTP = "core/transformer/multi_token_prediction.py"
MIXER = "core/ssm/mamba_mixer.py"
DELTA = "core/ssm/gated_delta_net"
DISPATCHER = "core/transformer/moe/token_dispatcher.py"
ROUTER = "core/transformer/moe/router.py"
ROUTER_LOG = "core/transformer/moe/moe_logging.py"
LANGUAGE = "core/models/common/language_module/language_module.py"
MAPPINGS = "core/tensor_parallel/mappings.py"
ADAM = "core/optimizer/distrib_optimizer.py"
OPTIMIZER = "core/optimizer/optimizer.py"
RERUN = "core/rerun_state_machine.py"
TRAINING = "training/training.py"
ELASTIC = "../torch/distributed/elastic"
DCP = "../torch/distributed/checkpoint"
AGENT = f"{ELASTIC}/agent/server/api.py"
LOCAL_AGENT = f"{ELASTIC}/agent/server/local_elastic_agent.py"
ASYNC = "core/dist_checkpointing/strategies/async_utils.py"
PROCESSES = f"{ELASTIC}/multiprocessing/api.py"


@dataclass(frozen=True)
class Contract:
    """One place upstream that a reach answers."""

    reach: str
    file: str
    name: str = ""
    """Qualified name of a function or class in the file; empty for the whole file."""
    arguments: str | None = None
    """Names of the parameters, in order."""
    holds: tuple[str, ...] = ()
    """Code that stands there, whatever its line breaks and comments."""
    lacks: tuple[str, ...] = ()


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
        "gather_unequal_parts_over_gloo",
        MAPPINGS,
        "_gather_along_first_dim",
        "input_ group output_split_sizes use_global_buffer",
        ("torch.distributed.all_gather(output_tensor_list, input_, group=group)",),
    ),
    _C(
        "gather_unequal_parts_over_gloo",
        MAPPINGS,
        "_reduce_scatter_along_first_dim",
        "input_ group input_split_sizes use_global_buffer",
        ("torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",),
    ),
    _C(
        "load_optimizers_of_other_expert_layouts",
        "core/optimizer/optimizer.py",
        "ChainedOptimizer.load_state_dict",
        "self state_dict",
        ("if len(self.chained_optimizers) != len(state_dict):\n", "self._synchronize_steps()"),
    ),
    _C(
        "load_optimizers_of_other_expert_layouts",
        "core/optimizer/__init__.py",
        holds=("filter_fn=lambda g: g['is_expert_parallel']", "if len(moe_param_groups) > 0:\n"),
    ),
    _C(
        "load_optimizers_of_other_expert_layouts",
        OPTIMIZER,
        "MegatronOptimizer._filter_and_reorder_param_groups",
        holds=("for key, params in zip(needed_groups, params_in_state_dict_order):", "group['params'] = params"),
    ),
    _C(
        "save_no_empty_lists_of_main_parameters",
        OPTIMIZER,
        "Float16OptimizerWithFloat16Params.sharded_state_dict",
        "self model_sharded_state_dict is_loading metadata",
        ("state_dict['fp32_from_fp16_params'] = [",),
    ),
    _C(
        "load_momentum_of_sgd",
        OPTIMIZER,
        "MegatronOptimizer.__init__",
        "self optimizer config init_state_fn",
        ("self.init_state_fn = init_state_fn",),
    ),
    _C(
        "load_momentum_of_sgd",
        "core/optimizer/__init__.py",
        "_get_megatron_optimizer_based_on_param_groups",
        holds=("momentum=config.sgd_momentum)\n            init_state_fn = None",),
    ),
    _C(
        "load_sharded_buckets_of_leaves",
        ADAM,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        holds=("dst_tensors[key].copy_(tensors[key])",),
        lacks=("no_grad",),
    ),
    _C(
        "load_sharded_buckets_of_leaves",
        ADAM,
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        "self state_dict",
        lacks=("no_grad",),
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
        "save_optimizer_buckets_in_place",
        ADAM,
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "self model_sharded_state_dict is_loading metadata",
        ("self.get_parameter_state_dp_zero(use_gloo_comm=use_gloo_comm, empty_data=is_loading, return_on_all_ranks=",),
    ),
    _C(
        "save_optimizer_buckets_in_place",
        ADAM,
        "DistributedOptimizer.get_parameter_state_dp_zero",
        "self use_gloo_comm empty_data return_on_all_ranks",
        ("numel_unpadded",),
    ),
    _C(
        "count_flops_with",
        TRAINING,
        "num_floating_point_operations",
        "args batch_size seqlen_squared_sum_in_batch total_real_tokens_in_batch",
        lacks=("'P'", "'W'"),
    ),
    _C(
        "draw_batches_that_are_skipped",
        TRAINING,
        "dummy_train_step",
        "data_iterator",
        (
            "while rerun_state_machine.should_run_forward_backward(data_iterator):\n        for _ in range(num_micro",
            "if tp_rank == 0:\n                batch = next(data_iterator)",
            "create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader",
        ),
    ),
    _C(
        "write_metrics",
        TRAINING,
        "training_log",
        "loss_dict total_loss_dict learning_rate iteration loss_scale report_memory_flag skipped_iter grad_norm "
        "params_norm num_zeros_in_grad max_attention_logit pg_collection is_first_iteration "
        "seqlen_squared_sum_in_batch total_real_tokens_in_batch",
        (
            "should_reset = not is_first_iteration",
            "batch_size = args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size * "
            "get_num_microbatches()",
        ),
    ),
    _C(
        "write_metrics",
        TRAINING,
        "evaluate_and_print_results",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config verbose "
        "write_to_tensorboard non_loss_data_func pg_collection p2p_communicator",
        ("total_loss_dict, collected_non_loss_data, timelimit = evaluate(",),
    ),
    _C(
        "write_metrics",
        TRAINING,
        "train",
        holds=(
            "report_memory_flag = training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, "
            "report_memory_flag, skipped_iter, grad_norm,",
            "evaluate_and_print_results(prefix, forward_step_func, valid_data_iterator, model, iteration,",
            "num_floating_point_operations(args, batch_size,",
            "dummy_train_step(train_data_iterator)",
        ),
    ),
    _C("write_metrics", TRAINING, "train", holds=("iteration = args.iteration\n",)),
    _C("write_metrics", "training/checkpointing.py", "get_loaded_iteration", ""),
    _C(
        "count_tokens_of_experts",
        ROUTER,
        "TopKRouter._apply_expert_bias",
        "self routing_map padding_mask",
        ("self.local_tokens_per_expert += routing_map.sum(dim=0)",),
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
    _C("write_metrics", TRAINING, "checkpoint_and_decide_exit", holds=("save_checkpoint_and_time(",)),
    # bad_steps.py
    _C(
        "watch_steps",
        TRAINING,
        "train_step",
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration "
        "pg_collection p2p_communicator",
        (
            "while rerun_state_machine.should_run_forward_backward(data_iterator):",
            "    return ({}, True, should_checkpoint, should_exit, exit_code, None, None, 0)\n",
            "update_successful, grad_norm, num_zeros_in_grad = optimizer.step()",
            "if update_successful:\n",
            "    skipped_iter = 1",
        ),
    ),
    _C(
        "watch_steps",
        TRAINING,
        "train",
        holds=(
            "= train_step(forward_step_func, train_data_iterator, model, optimizer,",
            "    if should_checkpoint:\n",
            "    if should_exit:\n            break\n",
            # one too many, since the machine counts at the start of a step: docs/faults.md says so
            "rerun_state_machine.current_iteration = iteration\n",
        ),
    ),
    _C("watch_steps", TRAINING, holds=("kwargs['check_for_nan_in_grad'] = args.check_for_nan_in_loss_and_grad",)),
    _C("watch_steps", "training/initialize.py", "initialize_megatron", holds=("mode=RerunMode(args.rerun_mode)",)),
    _C(
        "watch_steps",
        "core/pipeline_parallel/schedules.py",
        "forward_step",
        holds=("output_tensor, loss_func = forward_step_func(data_iterator, model)",),
    ),
    _C(
        "watch_steps",
        "core/pipeline_parallel/schedules.py",
        "forward_step_calc_loss",
        holds=("outputs = loss_func(output_tensor)", "output_tensor, num_tokens, loss_reduced = outputs"),
    ),
    _C("watch_steps", OPTIMIZER, "ChainedOptimizer.step_with_ready_grads", "self"),
    _C("watch_steps", OPTIMIZER, "ChainedOptimizer.get_grad_norm", "self"),
    _C(
        "watch_steps",
        OPTIMIZER,
        "ChainedOptimizer.step",
        "self",
        (
            "grad_norm = self.get_grad_norm()",
            "update_successful = False if should_skip_update else self.step_with_ready_grads()",
        ),
    ),
    _C("watch_steps", "core/optimizer/__init__.py", "get_megatron_optimizer", holds=("ChainedOptimizer(",)),
    _C(
        "watch_steps",
        RERUN,
        "RerunStateMachine.should_run_forward_backward",
        "self data_iterator",
        (
            "will_rerun = self._reduce_any(self.rerun_requested)",
            "self.state = RerunState.RERUNNING_IN_PLACE\n        self._restore_state()",
        ),
    ),
    _C("watch_steps", RERUN, "RerunMode", lacks=("'report_stats'",)),  # which is refused: cli/checks.py
    _C("watch_steps", RERUN, "RerunStateMachine._restore_state", holds=("self.state_restore_func(",)),
    _C(
        "watch_steps",
        RERUN,
        "RerunStateMachine.validate_result",
        "self result rejection_func message comparison_func tolerance fatal",
        (
            "if fatal:\n                raise RuntimeError(full_message)",
            "if not self.first_iteration_complete:\n            return",
            "if node == self.suspicious_node and device == self.suspicious_device:",
        ),
    ),
    _C(
        "watch_steps",
        RERUN,
        "RerunStateMachine.is_unexpectedly_large",
        "self result threshold context num_samples resample",
        ("return value >= self.max_values[context] * threshold",),
    ),
    _C(
        "watch_steps",
        "core/distributed/finalize_model_grads.py",
        "finalize_model_grads",
        holds=("_update_router_expert_bias(",),  # before the optimizer knows whether it makes a step
    ),
    _C(
        "sample_indices",
        "training/datasets/data_samplers.py",
        "MegatronPretrainingSampler",
        holds=(
            "range(self.consumed_samples, self.total_samples)",
            "start_idx = self.data_parallel_rank * self.micro_batch_size",
            "yield batch[start_idx:end_idx]",
        ),
    ),
    _C(
        "documents",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._query_document_sample_shuffle_indices",
        "self idx",
        ("idx = self.shuffle_index[idx]", "document_ids.append(self.document_index[doc_index_beg])"),
    ),
    _C("documents", "core/datasets/megatron_dataset.py", holds=("self.dataset_path = dataset_path",)),
    _C(
        "blends",
        "training/utils/common_utils.py",
        "get_blend_and_blend_per_split",
        "args",
        ("get_blend_from_list(per_split_data_args['train'])", "get_blend_from_list(args.train_data_path)"),
    ),
    _C(
        "_check_ids",
        "core/tensor_parallel/layers.py",
        "VocabParallelEmbedding.forward",
        holds=("masked_input[input_mask] = 0", "output_parallel[input_mask, :] = 0.0"),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/megatron_dataset.py",
        "MegatronDataset.__init__",
        holds=(
            "self.unique_description = json.dumps(self.unique_identifiers, indent=4, default=lambda obj: "
            "obj.unique_identifiers)",
            "hashlib.md5(self.unique_description.encode('utf-8'), usedforsecurity=False)",
        ),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._build_document_sample_shuffle_indices",
        "self",
        (
            "os.path.join(self.dataset.path_prefix, 'cache', f'{type(self).__name__}_indices')",
            "base = f'{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}'",
            "get_path_to('description.txt')",
            "(not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0)",
        ),
    ),
    _C(
        "ContentGPTDataset",
        "core/datasets/blended_dataset.py",
        "BlendedDataset.__init__",
        holds=("[dataset.unique_identifiers for dataset in self.datasets]",),
    ),
    _C(
        "documents",
        "core/datasets/blended_dataset.py",
        "BlendedDataset.__getitem__",
        holds=("dataset_id = self.dataset_index[idx]", "dataset_sample_id = self.dataset_sample_index[idx]"),
    ),
    _C(
        "next_batch",
        "core/utils.py",
        "get_batch_on_this_tp_rank",
        "batch has_cu_seqlens is_hybrid_cp create_attention_mask_in_dataloader broadcast_src_rank broadcast_group "
        "cp_size tp_rank micro_batch_size seq_length mtp_on_this_rank pipeline_model_parallel_size "
        "is_pipeline_first_stage is_pipeline_last_stage",
    ),
    _C(
        "next_batch",
        "core/utils.py",
        "get_batch_on_this_cp_rank",
        "batch is_hybrid_cp cp_group hybrid_cp_group_func use_per_sequence_balancing",
    ),
    _C(
        "document_ids",
        "core/datasets/gpt_dataset.py",
        "_get_ltor_masks_and_position_ids",
        holds=("position_ids[data == eod_token]", "attention_mask[0, i + 1:, :i + 1] = 0"),
    ),
    _C("next_batch", MTP, "mtp_on_this_rank", "layout mtp_num_layers ignore_virtual vp_stage"),
    _C(
        "parse",
        "training/arguments.py",
        "parse_and_validate_args",
        "extra_args_provider ignore_unknown_args args_defaults",
        (
            "args = parse_args(extra_args_provider, ignore_unknown_args)",
            "validate_args(args, args_defaults)",
            "set_global_variables(args)",
        ),
    ),
    _C(
        "parse",
        "training/arguments.py",
        "parse_args",
        "extra_args_provider ignore_unknown_args",
        ("parser = extra_args_provider(parser)", "args.world_size = int(os.getenv('WORLD_SIZE', '1'))"),
    ),
    _C("add_hybrid_flags", "training/argument_utils.py", "ArgumentGroupFactory", holds=("def build_group(",)),
    _C("add_hybrid_flags", "training/argument_utils.py", "ArgumentGroupFactory.build_group", "self parser title"),
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
        "load_optimizers_of_other_schedules",
        ADAM,
        "DistributedOptimizer.load_state_dict",
        holds=(
            "for param_group in state_dict['optimizer']['param_groups']:\n",
            "{**param_groups_map[needed_groups], 'params': inner_param_group['params']}",
        ),
    ),
    _C(
        "load_optimizers_of_other_schedules",
        OPTIMIZER,
        "MegatronOptimizer._filter_and_reorder_param_groups",
        "current_groups state_dict_groups",
        ("loaded_groups_map = {_identifier_for(group): group for group in state_dict_groups}",),
    ),
    _C(
        "schedule",
        TRAINING,
        "get_optimizer_param_scheduler",
        "optimizer",
        ("wsd_decay_steps=wsd_decay_steps", "lr_warmup_steps = args.lr_warmup_fraction * lr_decay_steps"),
    ),
    _C(
        "schedule",
        "core/optimizer_param_scheduler.py",
        "OptimizerParamScheduler.state_dict",
        holds=("'lr_decay_steps': self.lr_decay_steps",),
        lacks=("wsd",),
    ),
    _C(
        "data_notes",
        "core/datasets/gpt_dataset.py",
        "GPTDataset._build_document_sample_shuffle_indices",
        holds=(
            "threshold = 0.8\n",
            "separate_final_epoch = num_samples_from_final_epoch < int(threshold * num_samples_per_epoch)",
        ),
    ),
    _C(
        "validate_on_whole_sets",
        TRAINING,
        "evaluate_and_print_results",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config verbose "
        "write_to_tensorboard non_loss_data_func pg_collection p2p_communicator",
        ("data_iterators = data_iterator if args.multiple_validation_sets else [data_iterator]",),
    ),
    _C(
        "validate_on_whole_sets",
        TRAINING,
        "build_train_valid_test_data_loaders",
        holds=("build_pretraining_data_loader(valid_d, args.consumed_valid_samples)",),
    ),
    _C("stored_common", "training/checkpointing.py", "generate_state_dict", holds=("state_dict['args'] = args",)),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "read_metadata",
        "tracker_filename",
        ("release = metastring == 'release'", "sys.exit()"),
    ),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "_load_base_checkpoint",
        holds=(
            "if maybe_msc.os.path.isfile(tracker_filename):\n",
            "iteration, release = read_metadata(tracker_filename)",
            "if getattr(args, 'ckpt_step', None):\n        iteration = args.ckpt_step\n",
            "if iteration == -1:\n",
            "get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)",
        ),
    ),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "load_checkpoint",
        holds=("if pretrained_dir is not None and (not checkpoint_exists(load_dir)):\n", "load_dir = pretrained_dir\n"),
    ),
    _C(
        "skip_second_check",
        "core/dist_checkpointing/serialization.py",
        "load",
        holds=("if verify_integrity:\n        verify_integrity_manifest(checkpoint_dir)\n",),
    ),
    _C("tensor_shapes", "core/dist_checkpointing/serialization.py", "load_tensors_metadata"),
    _C(
        "read_tensors",
        "core/dist_checkpointing/serialization.py",
        "load_plain_tensors",
        holds=("load(sharded_state_dict, checkpoint_dir, validate_access_integrity=False)",),
    ),
    _C(
        "build_on_one_process",
        "training/models/hybrid.py",
        "HybridModelBuilder.build_model",
        "self pg_collection pre_process post_process vp_stage",
    ),
    _C(
        "stored_tensors",
        "core/dist_checkpointing/mapping.py",
        "ShardedTensor",
        holds=("local_shape: Tuple", "global_offset: Tuple", "prepend_axis_num: int", "allow_shape_mismatch: bool"),
    ),
    _C("stored_tensors", "core/ssm/utils.py", "_split_tensor_factory", holds=("factory_sh_ten.narrow(split_dim,",)),
    _C(
        "save_weights",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=("f.write('release' if release else str(iteration))",),
    ),
    _C(
        "save_weights",
        "training/checkpointing.py",
        "load_checkpoint",
        holds=("if args.finetune or release:\n", "not release and (not args.finetune or gpt_compat_load_optim)"),
    ),
    # torch's: the default grace that run_node replaces, and the places that _Agent overrides
    _C(
        "run_node",
        PROCESSES,
        "SubprocessContext._close",
        "self death_sig timeout",
        ("handler.proc.wait(time_to_wait)",),
    ),
    _C("run_node", PROCESSES, "PContext.close", "self death_sig timeout"),
    _C(
        "run_node",
        PROCESSES,
        "PContext",
        holds=("def close(self, death_sig: signal.Signals | None=None, timeout: int=30)",),
    ),
    _C(
        "run_node",
        PROCESSES,
        "PContext.start",
        holds=("'TORCHELASTIC_SIGNALS_TO_HANDLE'", "signals_to_handle.split(',')"),
    ),
    _C("run_node", PROCESSES, "SubprocessContext._poll", "self", ("self.close()\n",)),
    _C("run_node", PROCESSES, "LogsSpecs.reify", "self envs"),
    _C(
        "run_node",
        f"{ELASTIC}/multiprocessing/subprocess_handler/subprocess_handler.py",
        "SubprocessHandler._popen",
        "self args env",
        ("kwargs['start_new_session'] = True",),
    ),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._shutdown", "self death_sig", ("self._pcontext.close(death_sig)",)),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._stop_workers", "self worker_group", ("self._shutdown()",)),
    _C(
        "run_node",
        LOCAL_AGENT,
        "LocalElasticAgent._start_workers",
        "self worker_group",
        ("return self._pcontext.pids()",),
    ),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._monitor_workers", "self worker_group", ("self._pcontext.wait(0)",)),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent._rendezvous",
        "self worker_group",
        ("worker_group.master_port = master_port\n", "self._store = store\n"),
    ),
    _C("run_node", AGENT, "SimpleElasticAgent._assign_worker_ranks", "self store group_rank group_world_size spec"),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent._invoke_run",
        holds=("if self._remaining_restarts > 0:\n", "self._remaining_restarts -= 1\n", "self._restart_workers("),
    ),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent.run",
        holds=("except SignalException as e:\n", "self._shutdown(e.sigval)"),
    ),
    _C(
        "run_node",
        f"{ELASTIC}/rendezvous/dynamic_rendezvous.py",
        "DynamicRendezvousHandler.next_rendezvous",
        holds=("if self._bootstrap_store_info is None:\n",),  # set once and for all restarts
    ),
    _C("state_of_the_run", TRAINING, "train", holds=("args.curr_iteration = iteration\n", "sys.exit(exit_code)")),
    _C(
        "result_validation_codes",
        "core/rerun_state_machine.py",
        holds=("EXIT_CODE_RESUME_TO_DISAMBIGUATE: int = 16", "EXIT_CODE_FAILED_ON_RESULT_VALIDATION: int = 17"),
    ),
    _C("signal_received", "training/dist_signal_handler.py", "DistributedSignalHandler.signals_received", "self"),
    _C(
        "signal_received",
        TRAINING,
        "checkpoint_and_decide_exit",
        holds=("if any(signal_handler.signals_received()):",),
    ),
    _C(
        "end_helpers",
        "training/datasets/data_samplers.py",
        "build_pretraining_data_loader",
        holds=("DistributedSignalHandler(args.exit_signal).__enter__()",),
    ),
    _C(
        "spare_helpers_the_signal",
        "core/dist_checkpointing/strategies/filesystem_async.py",
        "get_write_results_queue",
        "mp_mode",
        ("mp_mode: str='spawn'", "ctx.Manager().Queue()"),
    ),
    _C(
        "spare_helpers_the_signal",
        "core/dist_checkpointing/strategies/async_utils.py",
        "PersistentAsyncCaller._get_process",
        holds=("mp_mode: str='spawn'", "cls._persistent_process.start()"),
    ),
    _C(
        "guard_saves",
        "core/dist_checkpointing/validation.py",
        "save_integrity_manifest",
        "checkpoint_dir",
        ("json.dump(payload, f, indent=2)",),
    ),
    _C(
        "guard_saves",
        "core/dist_checkpointing/serialization.py",
        "save",
        holds=(
            "save_integrity_manifest(checkpoint_dir)\n",
            "async_request.finalize_fns.append(metadata_finalize_fn)\n    if verify_integrity:\n"
            "        async_request.finalize_fns.append(integrity_finalize_fn)",
        ),
    ),
    _C("guard_saves", "training/async_utils.py", "schedule_async_save", "async_request"),
    _C(
        "guard_saves",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=(
            # the pointer, then what is appended to the request, and all of it behind the manifest
            "async_save_request.add_finalize_fn(iter_finalize_fn)",
            "schedule_async_save(async_save_request)\n",
            "f.write('release' if release else str(iteration))",
            "ensure_directory_exists(checkpoint_name, check_parent=False)",
        ),
    ),
    _C("guard_saves", TRAINING, holds=("load_checkpoint, save_checkpoint, save_grads\n",)),
    _C("guard_saves", TRAINING, "train", holds=("maybe_finalize_async_save(blocking=True, terminate=True)",)),
    _C(
        "_check_optimizer",
        "training/checkpointing.py",
        "generate_state_dict",
        holds=("if not args.no_save_optim:\n",),
    ),
    _C(
        "saving_flags",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=("Don't use '--dist-ckpt-optim-fully-reshardable' when saving local checkpoints.",),
    ),
    _C(
        "saving_flags",
        "training/arguments.py",
        "validate_args",
        holds=("if not args.use_persistent_ckpt_worker:\n", "args.async_save = False\n"),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        "training/async_utils.py",
        "_get_async_calls_queue",
        "",
        ("persistent=getattr(args, 'use_persistent_ckpt_worker', False)",),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        "training/initialize.py",
        "initialize_megatron",
        holds=("if args.async_save and args.use_persistent_ckpt_worker:\n",),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        ASYNC,
        "TemporalAsyncCaller.schedule_async_call",
        "self async_req",
        ("ctx = mp.get_context('fork')",),
    ),
    _C(
        "keep_vocabulary",
        "core/tokenizers/utils/build_tokenizer.py",
        "_set_padded_vocab_size",
        "args tokenizer",
        ("args.padded_vocab_size = vocab_size_with_padding(tokenizer.vocab_size, args)",),
    ),
    _C(
        "size_by_largest_id",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.vocab_size",
        "self",
        ("return len(self.tokenizer)",),
    ),
    _C(
        "compare",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.text_to_ids",
        "self text",
        ("tokens = self.text_to_tokens(text)\n", "ids = self.tokens_to_ids(tokens)\n"),
    ),
    _C(
        "compare",
        "core/tokenizers/text/libraries/huggingface_tokenizer.py",
        "HuggingFaceTokenizer.__init__",
        holds=("special_tokens_dict['sep_token'] = self.tokenizer.eos_token\n", "self.add_special_tokens("),
    ),
    _C(
        "admit_known_classes_only",
        f"{DCP}/filesystem.py",
        "FileSystemReader.read_metadata",
        "self",
        ("metadata = pickle.load(metadata_file)\n", "metadata.storage_meta.load_id = self.load_id\n"),
    ),
    _C(
        "admit_known_classes_only",
        f"{DCP}/default_planner.py",
        "DefaultLoadPlanner.load_bytes",
        "self read_item value",
        (
            "self.original_state_dict, self.mappings[read_item.dest_index.fqn], torch.load(value, weights_only=False)",
            "self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=False)",
        ),
    ),
    _C(
        "admit_known_classes_only",
        "core/dist_checkpointing/strategies/common.py",
        "load_common",
        "checkpoint_dir",
        ("return maybe_msc.torch.load(load_path, map_location='cpu')",),
    ),
    _C(
        "admit_known_classes_only",
        "core/dist_checkpointing/serialization.py",
        "load_common_state_dict",
        holds=("return load_common(checkpoint_dir)\n",),
    ),
    _C(
        "admit_known_classes_only",
        "core/safe_globals.py",
        "SafeUnpickler",
        holds=("('torch.storage', '_load_from_bytes')", "if (module, name) not in self._SAFE_CLASSES:"),
    ),
    *(
        _C(
            "admit_known_classes_only",
            f"core/datasets/{name}_dataset.py",
            holds=("from megatron.core.safe_globals import safe_numpy_load\n", "allow_pickle=True, mmap_mode='r')"),
        )
        for name in ("gpt", "blended", "masked")
    ),
    _C(
        "end_helpers",
        ASYNC,
        "AsyncCallsQueue.close",
        "self abort",
        ("if self.persistent and AsyncCallsQueue._persistent_caller:\n",),
    ),
    _C("end_helpers", ASYNC, "PersistentAsyncCaller.close", "self abort", ("if abort:\n", "self.process.kill()")),
    _C(
        "spawn_the_worker",
        "training/initialize.py",
        "initialize_megatron",
        holds=("init_persistent_async_worker(args.rank, 'forkserver')",),
    ),
    _C(
        "spawn_the_worker",
        "training/async_utils.py",
        "init_persistent_async_worker",
        "rank mp_mode",
        ("warmup_kwargs['mp_mode'] = mp_mode", "get_write_results_queue(mp_mode='fork')"),
    ),
    _C(
        "spawn_the_worker",
        "core/dist_checkpointing/strategies/filesystem_async.py",
        "get_write_results_queue",
        "mp_mode",
        ("if _results_queue is None:",),
    ),
    _C(
        "notice_a_dead_worker",
        ASYNC,
        "PersistentAsyncCaller.is_current_async_call_done",
        "self blocking no_dist",
        ("self.cur_item = self._persistent_comp_q.get_nowait()", "if not blocking:", "sleep(0.1)"),
        ("self.process.is_alive()",),
    ),
    _C(
        "replace in cpu.py",
        "core/tensor_parallel/random.py",
        "CudaRNGStatesTracker.fork",
        "self name",
        ("cpu_rng_state = torch.get_rng_state()",),
    ),
    _C(
        "replace in cpu.py",
        "core/optimizer/optimizer.py",
        holds=("'torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor'", "'torch.cuda.FloatTensor'"),
    ),
    _C(
        "set_connections",
        "training/arguments.py",
        "validate_args",
        holds=("get_device_arch_version() < 10", "os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS') == '1'"),
    ),
]


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((UPSTREAM / file).read_text())


def node(file: str, name: str) -> ast.AST:
    """The syntax tree of a function, a class or (for an empty name) a file.

    Raises:
        LookupError: There is none of this name.
    """
    found: ast.AST = _tree(file)
    for part in filter(None, name.split(".")):
        parts = [n for n in ast.walk(found) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not parts:
            raise LookupError(f"megatron/{file} has no {name}")
        found = parts[0]
    return found
