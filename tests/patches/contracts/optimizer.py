"""Upstream code that is relied on for the optimizer's state in checkpoints."""

from tests.patches.contract import ADAM, OPTIMIZER, Contract

_C = Contract
CONTRACTS = [
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
]
