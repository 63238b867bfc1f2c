"""What a run's flags say against what is stored in the checkpoint that it goes on from, beside the tensors' shapes.

A setting that says what a layer computes, or how the learning rate goes on, is refused where it differs. Everything
else may change: layout, batch, kernels, precision, losses and their coefficients, dropout, logging, saving, data. Of
changes that give other samples than those of the uninterrupted run there is a note.
"""

import warnings
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_hybrid.checkpoint import unpickling
from megatron_hybrid.data.blend import split_fractions
from megatron_hybrid.data.indexed import read_index
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.layers.registry import LAYERS, layers_of

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

    Unpickles admitted classes alone (:mod:`megatron_hybrid.checkpoint.unpickling`); what is in the folder has to be
    verified first (:mod:`megatron_hybrid.checkpoint.resume`).
    """
    from megatron.core import dist_checkpointing

    unpickling.admit_known_classes_only()
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
    return name in _settings() or any(name in layer.account.may_differ for layer in LAYERS.values())


def _settings() -> set[str]:
    """What some layer computes by."""
    return {*ALL_LAYERS.split(), *(name for layer in LAYERS.values() for name in layer.account.stored_settings)}


def _allowed(names: Iterable[str]) -> set[str]:
    """The settings of --allow-changed, written as flags or as names.

    Raises:
        ValueError: One that cannot be allowed, or that needs not be.
    """
    found = {name.removeprefix("--").replace("-", "_") for name in names}
    wrong = sorted(name for name in found if not _may_be_allowed(name))
    if wrong:
        known = sorted(_settings())
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
            differ[f"--{name.replace('_', '-')}"] = (getattr(stored, name), getattr(args, name))
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
        f"--{n.replace('_', '-')} was {getattr(stored, n)} and is {getattr(args, n)}. "
        for n in names
        if getattr(stored, n, None) != getattr(args, n) and getattr(args, n) is not None
    ]
    return "".join(told)


def _wsd_steps(stored: Namespace) -> int | None:
    """Samples of the checkpoint's cool-down (``get_optimizer_param_scheduler``)."""
    if getattr(stored, "lr_wsd_decay_iters", None) is not None:
        return stored.lr_wsd_decay_iters * stored.global_batch_size
    return getattr(stored, "lr_wsd_decay_samples", None)


# The data --------------------------------------------------------------------------------------------


def data_notes(stored: Namespace, args: Namespace) -> list[str]:
    """What makes a run draw other samples from here on than the one that wrote the checkpoint would have.

    Megatron shuffles all passes over a data set together (core/datasets/gpt_dataset.py:514): a longer run that needs
    one more shuffles anew, and some samples come again that were seen, and others late.
    """
    notes = []
    for name in ("reset_attention_mask", "eod_mask_loss"):
        if getattr(stored, name, None) not in (None, getattr(args, name)):
            notes.append(f"WARNING: {name} is {getattr(args, name)}, and was {getattr(stored, name)}")
    changed = {
        name: (getattr(stored, name), getattr(args, name))
        for name in ("seed", "seq_length", "split", "data_path", "train_data_path", "per_split_data_args_path")
        if getattr(stored, name, None) is not None and _names(getattr(stored, name)) != _names(getattr(args, name))
    }
    for name, (was, now) in changed.items():
        notes.append(
            f"WARNING: {name} is {_short(now)}, and was {_short(was)}: samples are drawn in another order from the "
            "start, so some come again and others never"
        )
    for part, (was, now) in {} if changed or args.mock_data else _passes(stored, args).items():
        if was != now:
            notes.append(
                f"WARNING: {part} takes {_told(now)}, and {_told(was)} in the run that wrote the checkpoint: the order "
                "changes from the start, so that some samples come again and others late"
            )
    return notes


def _told(order: tuple[int, bool]) -> str:
    passes, apart = order
    words = "1 pass over the data" if passes == 1 else f"{passes} passes over the data"
    return f"{words} (the last of them shuffled by itself)" if apart else words


def _names(value: Any) -> Any:
    """A list of data without the folders, which may have moved."""
    return [Path(word).name for word in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _passes(stored: Namespace, args: Namespace) -> dict[str, tuple[tuple, tuple]]:
    """Name of a data set's part to the order's key under the stored and under this run's length."""
    found: dict[str, tuple[tuple, tuple]] = {}
    if args.rank != 0:
        return found
    counts = {"training": _train_samples, "validation": _validation_samples}
    for part, paths, weights in _drawn_from(args):
        if part not in counts or (part == "validation" and args.full_validation):
            continue
        total = sum(weights) if weights else None
        for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
            try:
                tokens = _part_tokens(path, part, args)
            except ValueError:
                continue  # an index that another tool wrote: upstream's to judge
            share = weight / total if total else None
            both = [_order(tokens, _drawn(counts[part](one), share), args.seq_length) for one in (stored, args)]
            found[f"{part} on {Path(path).name}"] = (both[0], both[1])
    return found


def _drawn_from(args: Namespace) -> list[tuple[str, list[str], list[float] | None]]:
    """Part, data sets and weights of what the run draws from; several sets without weights are read once each."""
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    parts = ("training", "validation", "test")
    found = zip(parts, per_split, strict=True) if per_split else ((part, blend) for part in parts)
    return [(part, *one) for part, one in found if one and (one[1] or len(one[0]) == 1)]


def _part_tokens(path: str, part: str, args: Namespace) -> int:
    """Tokens in a part of a data set, as upstream's ``_build_megatron_dataset_splits`` cuts it."""
    lengths = read_index(Path(path)).lengths
    if not (args.data_path or args.data_args_path):
        return int(lengths.sum(dtype=np.int64))
    first, second, _ = (round(end * float(len(lengths))) for end in split_fractions(args.split))
    begin, end = (0, first) if part == "training" else (first, second)
    return int(lengths[begin:end].sum(dtype=np.int64))


def _steps(args: Namespace) -> int | None:
    if args.train_iters or not getattr(args, "train_samples", None):
        return args.train_iters
    return args.train_samples // args.global_batch_size


def _train_samples(args: Namespace) -> int | None:
    if getattr(args, "train_samples", None):
        return args.train_samples
    return args.train_iters * args.global_batch_size if args.train_iters else None


def _validation_samples(args: Namespace) -> int | None:
    """As upstream's ``get_train_valid_test_num_samples`` has it."""
    steps = _steps(args)
    if not (steps and args.eval_iters):
        return None
    points = steps // args.eval_interval + 1 if args.eval_interval else 1
    if args.start_eval_at_iter is not None and args.eval_interval:
        points = max(0, points - args.start_eval_at_iter // args.eval_interval)
    return points * args.eval_iters * (args.eval_global_batch_size or args.global_batch_size)


def _drawn(samples: int | None, share: float | None) -> int | None:
    """Of one source (upstream's ``_get_size_per_split_per_dataset``, with its surplus)."""
    if samples is None or share is None:
        return samples
    return int(np.ceil(np.ceil(samples * share) * 1.005))


def _order(tokens: int, samples: int | None, length: int) -> tuple[int, bool]:
    """What the order follows from: the passes, and whether the last one is shuffled by itself (gpt_dataset.py:517)."""
    if not tokens or samples is None:
        return 1, False
    passes = max(1, -(-(samples * length + 1) // tokens))
    if passes == 1:
        return 1, False
    last = samples - ((passes - 1) * tokens - 1) // length
    return passes, last < int(0.8 * ((tokens - 1) // length))
