"""What a run's flags say against what is stored in the checkpoint that it goes on from, beside the tensors' shapes.

A setting that says what a layer computes, or how the learning rate goes on, is refused where it differs. Everything
else may change: layout, batch, kernels, precision, losses and their coefficients, dropout, logging, saving, data. Of
changes that give other samples than those of the uninterrupted run there is a note.
"""

import warnings
from argparse import Namespace
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from megatron_hybrid.argv import flag_name
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.layers.registry import LAYERS, layers_of
from megatron_hybrid.patches.unpickling import admit_known_classes_only

SHAPES = (
    "hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels "
    "add_bias_linear add_qkv_bias attention_output_gate untie_embeddings_and_output_weights mtp_num_layers "
    "mtp_use_repeated_layer"
)
"""Settings of all layers that the tensors show, too. Upstream would end at these, or leave tensors out."""
ALL_LAYERS = (
    "normalization layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm "
    "use_mup mup_embedding_mult mup_output_mult mup_attn_scale_power mup_base_head_dim mup_base_hidden_size "
    "mup_width_mult"
)
"""Settings that say what all layers compute; each layer's account has its own (``stored_settings``)."""


def stored_common(folder: str) -> dict[str, Any]:
    """What a checkpoint has beside tensors: ``args`` (training/checkpointing.py:1311), ``opt_param_scheduler`` ...

    Unpickles admitted classes alone (:mod:`megatron_hybrid.patches.unpickling`); what is in the folder has to be
    verified first (:mod:`megatron_hybrid.checkpoint.resume`).
    """
    from megatron.core import dist_checkpointing

    admit_known_classes_only()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it has not started yet
        return dist_checkpointing.load_common_state_dict(folder)


def stored_arguments(folder: str) -> Namespace | None:
    """The arguments that upstream stores with each checkpoint; None if it has none. See :func:`stored_common`."""
    return stored_common(folder).get("args")


def check_model(stored: Namespace, args: Namespace, folder: str) -> list[str]:
    """Refuses settings of the model that differ from the checkpoint's.

    Args:
        stored: The arguments in the checkpoint.
        args: Megatron's, validated; ``allow_changed`` names settings that may differ.
        folder: The checkpoint's, for the message.

    Returns:
        A note for each difference that is allowed.

    Raises:
        ValueError: With the names and both values.
    """
    allowed = _allowed(args.allow_changed)
    accounts = [layer.account for layer in layers_of(args.hybrid_layer_pattern)]
    relevant = SHAPES.split() + ALL_LAYERS.split() + [name for account in accounts for name in account.stored_settings]
    differ = {
        name: (getattr(stored, name), getattr(args, name))
        for name in relevant
        if hasattr(stored, name) and hasattr(args, name) and not _same(getattr(stored, name), getattr(args, name))
    }
    for account in accounts:
        for name, (was, now) in account.stored_differences(stored, args).items():
            differ[name] = (_text(was), _text(now))
    refused = {name: both for name, both in differ.items() if name not in allowed}
    if refused:
        told = "; ".join(f"{name} is {was} in it and {now} here" for name, (was, now) in refused.items())
        free = [name for name in refused if _may_be_allowed(name)]
        remedy = f", or, to change it on purpose, add --allow-changed {' '.join(free)}" if free else ""
        raise ValueError(
            f"The model in {folder} computes something else than this run's flags: {told}. Give the flags that it was "
            f"trained with (its run.json has them){remedy}."
        )
    return [f"{name} is {now}, and {was} in the checkpoint (--allow-changed)" for name, (was, now) in differ.items()]


def _may_be_allowed(name: str) -> bool:
    """Whether a setting can differ at all: one that the shapes show cannot."""
    return name in computed_by() or any(name in layer.account.may_differ for layer in LAYERS.values())


def computed_by() -> set[str]:
    """The settings that say what some layer computes."""
    return {*ALL_LAYERS.split(), *(name for layer in LAYERS.values() for name in layer.account.stored_settings)}


def _allowed(names: Iterable[str]) -> set[str]:
    """The settings of --allow-changed, written as flags or as names.

    Raises:
        ValueError: One that cannot be allowed, or that needs not be.
    """
    found = {name.removeprefix("--").replace("-", "_") for name in names}
    wrong = sorted(name for name in found if not _may_be_allowed(name))
    if wrong:
        known = sorted(computed_by())
        raise ValueError(
            f"--allow-changed {' '.join(wrong)}: it takes settings that change what a layer computes and no shape "
            f"({', '.join(known)}, intra_branches and the other axes of P). Layout, batch, schedule, kernels and "
            "logging may change without it."
        )
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return one == other or (one in (None, False) and other in (None, False))


def _text(value: Any) -> Any:
    return ",".join(value) if isinstance(value, tuple) else value


# The schedule ----------------------------------------------------------------------------------------

SCHEDULE = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "the warm-up in samples (--lr-warmup-*)",
    "lr_decay_steps": "the samples until the end of the decay (--lr-decay-*, else --train-iters x --global-batch-size)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay (or --weight-decay)",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "the samples over which the weight decay grows (--train-iters x --global-batch-size)",
}
"""What upstream compares (core/optimizer_param_scheduler.py:365), and the flags that it follows from."""
STORED = ("lr_warmup_init", "lr_wsd_decay_style", "adam_beta1", "adam_beta2", "adam_eps")
"""What it does not compare, by the flags in the checkpoint."""


def schedule(args: Namespace) -> dict[str, Any]:
    """The learning-rate schedule of this run's flags, by upstream's own function; Megatron's globals must be set.

    Raises:
        ValueError: Upstream refuses it, with its reason.
    """
    from megatron.training.training import get_optimizer_param_scheduler

    # it fills these in on the way, and would take a run of samples for one of iterations the next time
    names = ("train_iters", "lr_decay_iters", "lr_decay_samples")
    kept = {name: getattr(args, name) for name in names}
    try:
        with upstream_errors_as_value_errors():
            built = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:
        vars(args).update(kept)
    return {**built.state_dict(), "wsd_decay_steps": built.wsd_decay_steps}


def check_schedule(common: dict[str, Any], args: Namespace, folder: str) -> list[str]:
    """Refuses a schedule that differs from the checkpoint's, unless the flags say which of the two holds.

    Args:
        common: What the checkpoint has beside tensors.
        args: Megatron's, validated.
        folder: The checkpoint's, for the message.

    Returns:
        Notes for the user.

    Raises:
        ValueError: With all differences and the two ways to go on.
    """
    stored, saved, now = common["args"], common.get("opt_param_scheduler"), schedule(args)
    if saved is None:  # check_optimizer_state has had its say
        return []
    constant = now["wd_incr_style"] == "constant"
    differ = {
        told: (saved[key], now[key])
        for key, told in SCHEDULE.items()
        if key in saved and saved[key] != now[key] and not (key == "wd_incr_steps" and constant)
    }
    decay = _wsd_steps(stored)
    if now["lr_decay_style"] == "WSD" and decay is not None and decay != now["wsd_decay_steps"]:
        differ["the cool-down in samples (--lr-wsd-decay-*)"] = (decay, now["wsd_decay_steps"])
    for name in STORED:
        if hasattr(stored, name) and getattr(stored, name) != getattr(args, name):
            differ[flag_name(name)] = (getattr(stored, name), getattr(args, name))
    if args.override_opt_param_scheduler:
        flag = "--override-opt-param-scheduler"
        return [f"{told}: {new}, and {was} in the checkpoint ({flag})" for told, (was, new) in differ.items()]
    if args.use_checkpoint_opt_param_scheduler:
        _take_schedule(args, stored, decay)
        flag = "--use-checkpoint-opt_param-scheduler"
        return [f"{told}: {was} as in the checkpoint, not {new} ({flag})" for told, (was, new) in differ.items()]
    if not differ:
        # upstream also compares the samples over which a constant weight decay grows
        args.use_checkpoint_opt_param_scheduler = saved.get("wd_incr_steps") != now["wd_incr_steps"]
        return []
    lines = "; ".join(f"{told}: {was} in the checkpoint, {new} by this run" for told, (was, new) in differ.items())
    raise ValueError(
        f"The checkpoint in {folder} was trained under another schedule than this run's flags give. "
        f"{_length(stored, args)}{lines[0].upper()}{lines[1:]}. To go on under these flags' schedule, from the step "
        "that the checkpoint has reached: --override-opt-param-scheduler. To keep the checkpoint's, however long the "
        "run is: --use-checkpoint-opt_param-scheduler. Else give the flags that it was trained with."
    )


def _take_schedule(args: Namespace, stored: Namespace, decay: int | None) -> None:
    """Takes from the checkpoint what upstream takes from the flags alone."""
    for name in ("lr_warmup_init", "lr_wsd_decay_style", "adam_beta1", "adam_beta2", "adam_eps"):
        setattr(args, name, getattr(stored, name, getattr(args, name)))
    if decay is not None and not args.train_samples and decay % args.global_batch_size:
        raise ValueError(
            f"--use-checkpoint-opt_param-scheduler: the checkpoint's cool-down is {decay} samples, which are no whole "
            f"steps of --global-batch-size {args.global_batch_size}: give a batch that divides it, --train-samples in "
            "place of --train-iters, or --override-opt-param-scheduler."
        )
    if decay is not None:
        args.lr_wsd_decay_samples = decay if args.train_samples else None
        args.lr_wsd_decay_iters = None if args.train_samples else decay // args.global_batch_size


def _length(stored: Namespace, args: Namespace) -> str:
    names = ("train_iters", "train_samples", "global_batch_size")
    told = [
        f"{flag_name(n)} was {getattr(stored, n)} and is {getattr(args, n)}. "
        for n in names
        if getattr(stored, n, None) != getattr(args, n) and getattr(args, n) is not None
    ]
    return "".join(told)


def _wsd_steps(stored: Namespace) -> int | None:
    """Samples of the checkpoint's cool-down (``get_optimizer_param_scheduler``)."""
    if getattr(stored, "lr_wsd_decay_iters", None) is not None:
        return stored.lr_wsd_decay_iters * stored.global_batch_size
    return getattr(stored, "lr_wsd_decay_samples", None)
