"""Patches of the optimizer's state in checkpoints: saved in place, and loaded in other layouts."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.patches.patching import Patch, Table

MAIN = "fp32_from_fp16_params"
"""Main parameters of 16-bit ones, without the distributed optimizer: a list for each parameter group."""


def load_optimizers_of_other_expert_layouts(load: Callable) -> Callable:
    """Loads optimizer state that was saved with another number of chained optimizers.

    Experts have an optimizer of their own only where expert parallelism is used
    (core/optimizer/__init__.py:1172), so that a checkpoint of 1 expert-parallel rank does not load on 2, nor the other
    way. The tensors have the same names either way; what differs is the nesting of the parameter groups, and their
    flag ``is_expert_parallel`` (core/optimizer/optimizer.py:1573). And a stage without experts has an optimizer of no
    parameters, whose empty state upstream does not find. States that upstream can load are left to it.
    """

    def load_state_dict(self: Any, state_dict: dict) -> None:
        several = len(self.chained_optimizers) > 1
        nested = [part for _, part in sorted((key, part) for key, part in state_dict.items() if isinstance(key, int))]
        flat = {key: part for key, part in state_dict.items() if not isinstance(key, int)}
        # what this rank has by itself, its parameters and their tensors, is nested as its optimizers are
        own = [state_dict.get(i, {}) for i in range(len(self.chained_optimizers))] if several else [flat]
        same_layout = not (flat and nested) and several == bool(nested)
        if same_layout and all(_is_whole(part) for part in own):
            load(self, state_dict)
            return
        for i, (one, part) in enumerate(zip(self.chained_optimizers, own, strict=True)):
            saved = [own[i]] if same_layout else [flat] if several else nested
            one.load_state_dict(_with_saved_groups(part, saved))
        if several:
            self._synchronize_steps()

    return load_state_dict


def _is_whole(part: dict) -> bool:
    """Whether the state of one optimizer has all that upstream looks for: empty dicts and lists are not stored."""
    if "param_state" in part:  # the distributed optimizer's
        return True
    return "state" in part.get("optimizer", part) and ("optimizer" not in part or MAIN in part)


def _with_saved_groups(own: dict, saved: list[dict]) -> dict:
    """The state of one optimizer of this rank, with what the saved ones have to say of their parameter groups.

    The inner optimizer's ``state`` and ``param_groups`` stand under ``optimizer``, but for fp32 without the distributed
    optimizer, where they are all there is: core/optimizer/optimizer.py:1191 and :1344.
    """
    groups = [group for part in saved for group in part.get("optimizer", part)["param_groups"]]
    # upstream lets the later of two equal groups win: the ones as saved stand last
    either = [{**g, "is_expert_parallel": not g["is_expert_parallel"]} for g in groups] + groups

    def merge(first: dict, own: dict) -> dict:
        # upstream finds groups by their settings, but parameters by their place (core/optimizer/optimizer.py:630)
        parameters = [group.get("params", []) for group in own.get("param_groups", ())]
        placed = either[:1] * (len(parameters) - len(either)) + either
        step = {name: value for name, value in first.get("state", {}).items() if name == "common_step"}
        return {
            **first,
            **own,
            "state": {**own.get("state", {}), **step},
            "param_groups": [
                {**g, "params": parameters[i] if i < len(parameters) else []} for i, g in enumerate(placed)
            ],
        }

    first = saved[0]
    if "optimizer" not in first:
        return merge(first, own)
    return {MAIN: [], **first, **own, "optimizer": merge(first["optimizer"], own.get("optimizer", {}))}


LR_FIELDS = ("max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps")
"""What of a parameter group follows from flags of the optimizer and its schedule."""


def load_optimizers_of_other_schedules(load: Callable) -> Callable:
    """Loads the distributed optimizer's state under other learning rates.

    Upstream finds the saved group of each parameter group by its fields, the learning rates among them: with
    ``--override-opt-param-scheduler`` and another ``--lr``, or ``--use-checkpoint-opt_param-scheduler`` without the
    checkpoint's, there is none (KeyError). Here both get the rates that the flag says before they are compared. The
    same goes for Adam's betas and epsilon, which upstream takes from the checkpoint whatever the flags.
    """

    def load_state_dict(self: Any, state_dict: dict) -> None:
        saved = state_dict.get("optimizer", {}).get("param_groups") if hasattr(self, "optimizer") else None
        if saved and not getattr(self, "is_stub_optimizer", False):
            agree_on_schedule(self.optimizer.param_groups, saved)
        load(self, state_dict)

    return load_state_dict


def pair_groups_of_other_schedules(pair: Callable) -> Any:
    """The same of the other optimizers."""

    def filter_and_reorder(current_groups: list, state_dict_groups: list) -> list:
        agree_on_schedule(current_groups, state_dict_groups)
        return pair(current_groups, state_dict_groups)

    return staticmethod(filter_and_reorder)


def agree_on_schedule(current: list[dict], saved: list[dict]) -> None:
    """Gives groups that differ in fields of the schedule alone the same ones: the flags', or the checkpoint's.

    Where a model has several learning rates, groups of the same kind are paired by their order.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training.global_vars import get_args

    from_flags = get_args().override_opt_param_scheduler
    kind_keys = [key for key in param_group_identifier_keys if key not in LR_FIELDS]

    def rates(group: dict) -> tuple:
        return tuple(group.get(key) or 0.0 for key in ("max_lr", "min_lr"))

    def kinds(groups: list[dict]) -> dict[tuple, dict[tuple, list[dict]]]:
        found: dict[tuple, dict[tuple, list[dict]]] = {}
        for group in groups:
            kind = tuple(group.get(key, group.get(f"pre_{key}")) for key in kind_keys)
            found.setdefault(kind, {}).setdefault(rates(group), []).append(group)
        return found

    there = kinds(saved)
    for kind, ours in kinds(current).items():
        theirs = there.get(kind, {})
        if len(ours) != len(theirs):
            continue  # upstream says what does not match
        for rate, their_rate in zip(sorted(ours), sorted(theirs), strict=True):
            source, to = (ours[rate], theirs[their_rate]) if from_flags else (theirs[their_rate], ours[rate])
            for group in to:
                group.update({key: source[0][key] for key in LR_FIELDS if key in source[0]})


def save_no_empty_lists_of_main_parameters(shard: Callable) -> Callable:
    """Lets bf16 and fp16 runs without the distributed optimizer go on where a stage has no experts.

    Under expert parallelism such a stage has an optimizer of no parameters (core/optimizer/optimizer.py:1158), and of
    what is not sharded a checkpoint has the first rank's: empty lists there do not fit those of the other stages.
    """

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict:
        state: dict = shard(self, *args, **kwargs)
        if not any(state[MAIN]):
            del state[MAIN]
        return state

    return sharded_state_dict


def load_momentum_of_sgd(start: Callable) -> Callable:
    """Lets runs of ``--optimizer sgd`` go on.

    A checkpoint is loaded into state that is there, which upstream has a function for with Adam and None with SGD.
    """

    def momentum(optimizer: Any, config: Any = None) -> None:
        for group in optimizer.param_groups if optimizer else ():
            for parameter in group["params"] if group.get("momentum") else ():
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def __init__(self: Any, optimizer: Any, config: Any, init_state_fn: Any = None) -> None:
        start(self, optimizer, config, init_state_fn or momentum)

    return __init__


def load_sharded_buckets_of_leaves(load: Callable) -> Callable:
    """Loads upstream's ``dp_reshardable`` format in fp32.

    The shards of main parameters are views of the model's there, and upstream writes into them with gradients on, which
    autograd refuses. The loaders of its other formats switch them off.
    """
    return torch.no_grad()(load)


def save_optimizer_buckets_in_place(cut: Callable) -> Callable:
    """Saves optimizer state from where it stands in the buffer.

    The fully reshardable format cuts each parameter's state out of a buffer by its position in the padded buffer,
    but is given one without the padding between buckets. Behind a bucket whose length is not a multiple of its
    alignment all state is written shifted, without an error: with tied embeddings and pipeline stages, the
    embedding's weights, moments and all after it, so that a resumed run continues from wrong weights. Here the
    padding is put back before the cutting. Moments that are not there before the first step are zero, which upstream
    looks for in vain.
    """

    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def padded(**options: Any) -> Any:
            state = gather(**options)
            for index, dtypes in state.items() if state else ():
                for tensors in dtypes.values() if index != "buckets_coalesced" else ():
                    pad_buckets(tensors, self.buffers[index].buckets)
            return state

        if not self.optimizer.state:  # no step yet, or none that fp16's loss scaling let through
            self.init_state_fn(self.optimizer, self.config)
        self.get_parameter_state_dp_zero = padded
        try:
            return cut(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def pad_buckets(tensors: dict[str, Any], buckets: list[Any]) -> None:
    """Puts the padding behind each bucket back into tensors [sum of unpadded lengths], in place of the dict."""
    unpadded = [bucket.numel_unpadded for bucket in buckets]
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets]
    for name, tensor in tensors.items():
        if torch.is_tensor(tensor):
            parts = zip(tensor.split(unpadded), padding, strict=True)
            tensors[name] = torch.cat([torch.nn.functional.pad(part, (0, pad)) for part, pad in parts])


_BASE = "megatron.core.optimizer.optimizer"
_SHARDED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
TABLE = Table(
    "optimizer state",
    (
        Patch(
            f"{_BASE}:ChainedOptimizer",
            "load_state_dict",
            load_optimizers_of_other_expert_layouts,
            "the number of chained optimizers depends on expert parallelism, and other numbers do not load",
            "core/optimizer/optimizer.py:1573",
        ),
        Patch(
            f"{_BASE}:Float16OptimizerWithFloat16Params",
            "sharded_state_dict",
            save_no_empty_lists_of_main_parameters,
            "empty lists of a stage without experts do not fit those of the other stages",
            "core/optimizer/optimizer.py:1138",
        ),
        Patch(
            _SHARDED,
            "sharded_param_state_fully_reshardable",
            save_optimizer_buckets_in_place,
            "behind a padded bucket all state is written shifted",
            "core/optimizer/distrib_optimizer.py:1690",
        ),
        Patch(
            _SHARDED,
            "load_parameter_state_from_dp_reshardable",
            load_sharded_buckets_of_leaves,
            "it writes into leaves with gradients on",
            "core/optimizer/distrib_optimizer.py:1225",
        ),
        Patch(
            f"{_BASE}:MegatronOptimizer",
            "__init__",
            load_momentum_of_sgd,
            "state of SGD is not made before it is loaded",
            "core/optimizer/optimizer.py:214",
        ),
        Patch(
            _SHARDED,
            "load_state_dict",
            load_optimizers_of_other_schedules,
            "groups are found by their learning rates",
            "core/optimizer/distrib_optimizer.py:937",
        ),
        Patch(
            f"{_BASE}:MegatronOptimizer",
            "_filter_and_reorder_param_groups",
            pair_groups_of_other_schedules,
            "groups are found by their learning rates",
            "core/optimizer/optimizer.py:595",
            contract="load_optimizers_of_other_schedules",
        ),
    ),
)
