"""Whether a run that goes on draws the samples that the uninterrupted run would have drawn."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.checkpoint.resume import takes_weights_alone
from megatron_hybrid.data.blend import split_fractions
from megatron_hybrid.data.indexed import read_index
from megatron_hybrid.training.datasets import Blend, blends


def order_notes(stored: Namespace | None, args: Namespace) -> list[str]:
    """What makes a run draw other samples from here on than the one that wrote the checkpoint would have.

    Megatron shuffles all passes over a data set together (core/datasets/gpt_dataset.py:514): a longer run that needs
    one more shuffles anew, and some samples come again that were seen, and others late.

    Args:
        stored: The arguments in the checkpoint that is loaded; None if there are none.
        args: Megatron's, validated. Where the run takes the weights alone, there are no notes.
    """
    if stored is None or args.skip_train or takes_weights_alone(args, args.checkpoint):
        return []
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
    for part, (paths, weights) in _drawn_from(args):
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


def _drawn_from(args: Namespace) -> list[tuple[str, Blend]]:
    """Part and data sets of what the run draws from; several sets without weights are read once each."""
    whole, per_split = blends(args)
    parts = ("training", "validation", "test")
    found = zip(parts, per_split, strict=True) if per_split else ((part, whole) for part in parts)
    return [(part, one) for part, one in found if one and (one.weights or len(one.prefixes) == 1)]


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
