"""Upstream code that is relied on for the training loop."""

from tests.patches.contract import OPTIMIZER, RERUN, TRAINING, Contract

_C = Contract
CONTRACTS = [
    _C(
        "count_flops",
        TRAINING,
        "num_floating_point_operations",
        "args batch_size seqlen_squared_sum_in_batch total_real_tokens_in_batch",
        lacks=("'P'", "'W'"),
    ),
    _C(
        "draw_skipped_batch",
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
        "record_step",
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
        "record_validation",
        TRAINING,
        "evaluate_and_print_results",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config verbose "
        "write_to_tensorboard non_loss_data_func pg_collection p2p_communicator",
        ("total_loss_dict, collected_non_loss_data, timelimit = evaluate(",),
    ),
    _C(
        "keep_model",
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
    _C("stop_clock", TRAINING, "checkpoint_and_decide_exit", holds=("save_checkpoint_and_time(",)),
    # bad_steps.py
    _C(
        "watch_step",
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
    _C("measure_step", TRAINING, "train_step"),
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
        "validate_whole_sets",
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
    _C("stop_clock", TRAINING, "dummy_train_step", "data_iterator"),
    _C("stop_clock", TRAINING, "save_checkpoint_and_time", holds=("save_checkpoint(",)),
    _C("wrap_evaluate", TRAINING, "evaluate_and_print_results", holds=("timelimit = evaluate(",)),
    _C(
        "loss",
        "core/pipeline_parallel/schedules.py",
        "forward_step_calc_loss",
        holds=("output_tensor /= torch.clamp(num_tokens, min=1)", "output_tensor *= cp_group_size"),
    ),
]
