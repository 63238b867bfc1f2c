"""A model's weights by the names that checkpoints have for them, whole whatever the layout that wrote them."""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint.pickles import check_pickles
from megatron_hybrid.checkpoint.resume import verified
from megatron_hybrid.checkpoint.stored_settings import stored_arguments
from megatron_hybrid.patches.unpickling import admit_known_classes_only
from megatron_hybrid.run_folder.checkpoints import is_sealed, seal


def open_checkpoint(folder: str, unverified: bool = False) -> tuple[str, Namespace]:
    """Finds the checkpoint to load of a run's folder, or a checkpoint by its own folder, and verifies it.

    Args:
        folder: A run's, or a checkpoint's own.
        unverified: Open one that has no manifest, too.

    Returns:
        Its folder, and the arguments that it was trained with.

    Raises:
        ValueError: There is none that can be read.
    """
    from megatron.core import dist_checkpointing

    where = str(verified(folder, unverified))
    admit_known_classes_only()
    check_pickles(Path(where))
    args = stored_arguments(where) if dist_checkpointing.check_is_distributed_checkpoint(where) else None
    if args is None:
        raise ValueError(f"{where} has no arguments of a run: give a checkpoint of the format torch_dist.")
    return where, args


def tensor_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """Name to shape of all tensors in a checkpoint (core/dist_checkpointing/serialization.py:240)."""
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    return {key: tuple(tensor.global_shape) for key, tensor in load_tensors_metadata(checkpoint).items()}


def read_tensors(checkpoint: str, keys: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, whole (core/dist_checkpointing/serialization.py:305)."""
    from megatron.core.dist_checkpointing.serialization import load, load_tensors_metadata

    known = load_tensors_metadata(checkpoint)
    wanted = {key: known[key] for key in keys}
    loaded = load(dict(wanted), checkpoint, validate_access_integrity=False)
    return {key: loaded[key] for key in wanted}


def build_on_one_process(config: Any) -> Any:
    """A freshly initialised model of a configuration, without the wrappers of training.

    Megatron's globals must be set (:func:`megatron_hybrid.cli.arguments.parse`).
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    initialize_megatron()
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)


def stored_tensors(model: Any) -> list[Any]:
    """The ``ShardedTensor`` pieces as which a model on one process is stored; their data is the parameters' memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [piece for piece in nested_values(state) if isinstance(piece, ShardedTensor)]


def fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Writes whole tensors into the parameters of a model on one process.

    Args:
        model: Not wrapped.
        tensors: By their names in a checkpoint. One whose first dimension is padded to a length of its own (the
            vocabulary) is copied as far as both reach; others must have the model's shapes.
    """
    with torch.no_grad():
        for piece in stored_tensors(model):
            if piece.key not in tensors:
                continue
            whole, before = tensors[piece.key], piece.prepend_axis_num
            for index in piece.global_offset[:before]:
                whole = whole[index]
            places = zip(piece.global_offset[before:], piece.local_shape, strict=True)
            part = whole[tuple(slice(start, start + size) for start, size in places)]
            piece.data[tuple(slice(size) for size in part.shape)].copy_(part)


def save_weights(model: Any, folder: Path) -> None:
    """Saves a model's weights alone as what upstream calls a release: runs that load it start at iteration 0.

    Written under another name first: ``folder`` is there when it is whole.
    """
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.global_vars import get_args

    args = get_args()
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    args.save, args.async_save, args.no_save_optim, args.no_save_rng = str(temporary), False, True, True
    try:
        save_checkpoint(0, [model], None, None, 0, release=True)
        if not is_sealed(temporary / "release"):
            seal(temporary / "release")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
