"""--full-validation and --multiple-validation-sets: each validation reads every sample of every set exactly once.

Upstream 0.19.2 ends in a TypeError there: it broadcasts a number where it expects a list, asks ranks that read no data
for the length of theirs, takes the number of micro-batches for that of steps, and counts samples twice that it repeats
to fill a batch (training/training.py:4372, :4638, training/datasets/data_samplers.py:229).
"""

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_hybrid.patches.hooks import Wrapper

ROUNDS = 1 << 20
"""How often the sets can be read: more often than any run validates."""


class WholeSets(Dataset):
    """Sets one after the other, each filled up to whole batches with samples without loss; then again from the start.

    Upstream's sampler and its evaluation with ``--eval-iters`` then read each set once, in its own order, on any number
    of data-parallel ranks, and the samples that fill up a batch add nothing to the sum of losses or to the tokens.

    Args:
        datasets: At least one, none of them empty. Samples have a ``loss_mask``.
        batch: Samples of one evaluation step on all ranks (--eval-global-batch-size).
        split: Upstream's name of the split, by which it chooses the batch size.
    """

    def __init__(self, datasets: Sequence[Any], batch: int, split: Any):
        self.datasets = list(datasets)
        self.split = split
        self.iterations = [math.ceil(len(d) / batch) for d in self.datasets]
        """Evaluation steps of each set."""
        self._lengths = [n * batch for n in self.iterations]

    def __len__(self) -> int:
        return sum(self._lengths) * ROUNDS

    def __getitem__(self, index: int) -> dict[str, Any]:
        index %= sum(self._lengths)
        which = 0
        while index >= self._lengths[which]:
            index -= self._lengths[which]
            which += 1
        dataset = self.datasets[which]
        if index < len(dataset):
            return dataset[index]
        sample = dict(dataset[0])
        sample["loss_mask"] = torch.zeros_like(torch.as_tensor(sample["loss_mask"]))
        return sample


def check(args: Namespace) -> None:
    """Refuses combinations that cannot give each sample once.

    Raises:
        ValueError: With the flag to change.
    """
    if args.multiple_validation_sets and not args.full_validation:
        raise ValueError(
            "--multiple-validation-sets needs --full-validation: sets of different lengths take different numbers of "
            "steps. Add it, or drop --multiple-validation-sets."
        )
    if args.multiple_validation_sets and not (args.valid_data_path or args.per_split_data_args_path):
        raise ValueError(
            "--multiple-validation-sets needs the validation sets by themselves: give --train-data-path and "
            "--valid-data-path (or --per-split-data-args-path) in place of --data-path."
        )
    if args.validation_set_names and not args.multiple_validation_sets:
        raise ValueError("--validation-set-names needs --multiple-validation-sets: add it, or drop the names.")
    sets = [word for word in args.valid_data_path or () if not _is_number(word)]
    if args.validation_set_names and sets and len(args.validation_set_names) != len(sets):
        raise ValueError(
            f"--validation-set-names gives {len(args.validation_set_names)} names for {len(sets)} validation sets: "
            "give one for each."
        )
    if args.full_validation and args.dataloader_type not in (None, "single"):
        raise ValueError(
            f"--full-validation with --dataloader-type {args.dataloader_type}: validation would be drawn at random. "
            "Use single, or drop --full-validation."
        )


def validate_on_whole_sets(args: Namespace, build: Callable) -> tuple[Callable, dict[str, Wrapper]]:
    """Makes validations and the test read their whole sets; before Megatron is initialised.

    Upstream's own code for it is switched off. Its plain evaluation runs with the number of steps of each set, which
    rank 0 tells the others.

    Args:
        args: Megatron's global arguments. ``full_validation`` and ``multiple_validation_sets`` are off afterwards.
        build: ``build(samples, vp_stage, whole)``: train, validation and test sets; where ``whole`` is set, the latter
            two are all samples of their sets, and the second a list of sets where several are evaluated apart.

    Returns:
        The provider of data sets for ``pretrain``, and hooks of the run.
    """
    if args.mock_data:  # these have no end: --eval-iters says how many there are
        args.full_validation = False
        return build, {}
    several = args.multiple_validation_sets
    steps: dict[str, list[int]] = {}
    """Split to evaluation steps of each of its sets."""
    args.full_validation = args.multiple_validation_sets = False

    def provided(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        args.multiple_validation_sets = several
        train, *others = build(samples, vp_stage, whole=True)
        args.multiple_validation_sets = False
        wrapped = [_whole(found, args.eval_global_batch_size) for found in others]
        if not steps:
            _tell_steps(steps, wrapped)
            args.eval_iters = max((sum(n) for n in steps.values()), default=0)
            args.consumed_valid_samples = 0
        return train, *wrapped

    def with_steps_of_the_sets(evaluate_and_print: Callable) -> Callable:
        def evaluated(prefix: str, step: Any, data: Any, *rest: Any, **kwargs: Any) -> None:
            sets = steps["test" if "test set" in prefix else "validation"]
            args.multiple_validation_sets = several and "test set" not in prefix
            args.eval_iters = sets if args.multiple_validation_sets else sum(sets)
            data = [data] * len(sets) if args.multiple_validation_sets else data
            try:
                evaluate_and_print(prefix, step, data, *rest, **kwargs)
            finally:
                args.multiple_validation_sets, args.eval_iters = False, sum(sets)

        return evaluated

    return provided, {"validate_whole_sets": with_steps_of_the_sets}


def split_config(config: Any) -> tuple[Any, Any]:
    """A data set configuration cut in two: of the train split alone, and of the others without weights.

    Upstream refuses weights for whole sets: a blend of whole sets is one after the other. Sources of weight 0 stay out.
    """
    train, rest = copy.copy(config), copy.copy(config)
    if config.blend_per_split:
        train.blend_per_split = [config.blend_per_split[0], None, None]
        rest.blend_per_split = [None, *(_unweighted(blend) for blend in config.blend_per_split[1:])]
    elif config.blend:
        first, *others = config.split_matrix
        train.split_matrix, rest.split_matrix = [first, None, None], [None, *others]
        rest.blend = _unweighted(config.blend)
    return train, rest


def _unweighted(blend: Any) -> Any:
    if blend is None:
        return None
    paths, weights = blend
    return [path for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True) if weight], None


def _whole(found: Any, batch: int) -> WholeSets | None:
    from megatron.core.datasets.utils import Split

    sets = [one for one in (found if isinstance(found, list) else [found]) if one is not None and len(one)]
    if not sets:
        return None
    return WholeSets(sets, batch, getattr(sets[0], "split", None) or getattr(sets[0], "index_split", Split.valid))


def _tell_steps(steps: dict[str, list[int]], wrapped: list[WholeSets | None]) -> None:
    """Steps of each set from rank 0, which always reads, to all ranks."""
    own = [[] if found is None else found.iterations for found in wrapped]
    told = [own]
    torch.distributed.broadcast_object_list(told, src=0)
    steps["validation"], steps["test"] = told[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
