"""Unpickling by admitted classes alone, wherever Megatron, torch or a tool of ours reads a pickle.

A checkpoint of the format torch_dist holds pickles in three places, a run's index cache in a fourth:

- ``.metadata``: :data:`METADATA`, and torch's dtypes;
- ``common.pt`` of older ones, object entries in ``*.distcp`` (arguments, random states, the rerun state machine), and
  the files of the format torch: what torch admits under ``weights_only``, and :data:`OBJECTS`;
- states of Transformer Engine inside these entries (``_extra_state``): Megatron's ``SafeUnpickler``, mended here;
- ``.npy`` files of the index cache: none at all.

A pickle that names anything else ends in :class:`Refused`, before it is made.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.patches.patching import Patch, Table, Value, install

METADATA = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # where torch before 2.3 had them
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # the name of a layout to the layout, out of a table
    ("collections", "OrderedDict"),
}
"""What ``.metadata`` may name (torch/distributed/checkpoint/metadata.py, filesystem.py)."""

OBJECTS = (
    "_io.BytesIO",
    "argparse.Namespace",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
"""What stored arguments and states may name beside torch's own list (torch/_weights_only_unpickler.py:156).

Megatron registers them with torch (core/safe_globals.py:31); a test fails if it registers others.
"""


class Refused(ValueError):
    """A pickle names something that no checkpoint has."""


def load_object(stream: Any, where: Any, device: str | None = "cpu") -> Any:
    """What ``torch.save`` wrote, from a stream that can be sought in, of admitted classes alone.

    Args:
        stream: Of bytes.
        where: Its name in an error.
        device: Where tensors go; None for the one that they were on.

    Raises:
        Refused: With the file and the class.
    """
    try:
        return torch.load(stream, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # of a device, say
        raise _refused(where, error) from None


def load_index(path: Any, **kwargs: Any) -> Any:
    """A ``.npy`` file of numbers, as ``numpy.load`` reads it; an array of objects is refused."""
    import numpy

    try:
        return numpy.load(path, **{**kwargs, "allow_pickle": False})
    except ValueError as error:
        if not re.search("pickle|Python objects", str(error)):
            raise
        raise Refused(
            f"{path} is no array of numbers but a pickle, which can hold a program: it is not read. Delete the folder "
            "of this index cache; it is made again."
        ) from None


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _find_class_of_states(self: Any, module: str, name: str) -> Any:
    """In place of SafeUnpickler.find_class: tensors inside are loaded under torch's limits."""
    from megatron.core.safe_globals import safe_load_from_bytes

    if (module, name) == ("torch.storage", "_load_from_bytes"):
        return safe_load_from_bytes
    if (module, name) not in self._SAFE_CLASSES:
        raise pickle.UnpicklingError(f"{module}.{name}")
    return pickle.Unpickler.find_class(self, module, name)


def load_pickle(unpickler: pickle.Unpickler, where: Any) -> Any:
    """What an unpickler reads.

    Raises:
        Refused: It names something else than it admits, or is broken.
    """
    try:
        return unpickler.load()
    except ImportError:
        raise
    except Exception as error:  # what a broken pickle raises is not said
        raise _refused(where, error) from None


def _refused(where: Any, error: Exception) -> Refused:
    """What the user reads; torch says the name in the middle of a page."""
    name = re.search(r"(?:GLOBAL|class|function) `?([\w.]*\.\w+)", str(error)) or re.match(r"([\w.]+)$", str(error))
    if name is None:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return Refused(
            f"{where} cannot be read ({reason}): it is corrupt, or no part of a checkpoint. Load another one."
        )
    return Refused(
        f"{where} is refused: it names {name[1]}. No checkpoint of Megatron's holds that, and unpickling it could run "
        "a program. Nothing of it was run. Load checkpoints from folders that only people whom you trust can write."
    )


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed.checkpoint.metadata import StorageMeta

    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as stream:
        metadata = load_pickle(_MetadataUnpickler(stream), path)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    stored = (self.metadata.storage_data or {}).get(read_item.storage_index)
    where = f"{getattr(stored, 'relative_path', 'a file')}, entry {read_item.dest_index.fqn}"
    thing = load_object(value, where, device=None)
    given = self.original_state_dict if self.flatten_state_dict else self.state_dict
    if self.flatten_state_dict:
        from torch.distributed.checkpoint._nested_dict import set_element

        set_element(given, self.mappings[read_item.dest_index.fqn], thing)
    else:
        given[read_item.dest_index.fqn] = thing


def _load_common(checkpoint_dir: Any) -> Any:
    from megatron.core.dist_checkpointing.serialization import COMMON_STATE_FNAME

    path = Path(checkpoint_dir) / COMMON_STATE_FNAME
    with path.open("rb") as stream:
        return load_object(stream, path)


_CONTRACT = "admit_known_classes_only"
TABLE = Table(
    "unpickling",
    (
        Patch(
            "torch.distributed.checkpoint:FileSystemReader",
            "read_metadata",
            Value(_read_metadata),
            "it unpickles without limits",
            "../torch/distributed/checkpoint/filesystem.py:930",
            contract=_CONTRACT,
        ),
        Patch(
            "torch.distributed.checkpoint:DefaultLoadPlanner",
            "load_bytes",
            Value(_load_bytes),
            "it asks for weights_only=False",
            "../torch/distributed/checkpoint/default_planner.py:362",
            contract=_CONTRACT,
        ),
        Patch(
            "megatron.core.dist_checkpointing.serialization",
            "load_common",
            Value(_load_common),
            "it leaves the choice to an environment variable",
            "core/dist_checkpointing/strategies/common.py:48",
            contract=_CONTRACT,
        ),
        Patch(
            "megatron.core.safe_globals:SafeUnpickler",
            "find_class",
            Value(_find_class_of_states),
            "it admits torch.storage._load_from_bytes, which unpickles its argument without limits",
            "core/safe_globals.py:104",
            contract=_CONTRACT,
        ),
        *(
            Patch(
                f"megatron.core.datasets.{name}_dataset",
                "safe_numpy_load",
                Value(load_index),
                "it unpickles arrays of objects, by SafeUnpickler",
                f"core/datasets/{name}_dataset.py:{line}",
                contract=_CONTRACT,
            )
            for name, line in (("gpt", 638), ("blended", 227), ("masked", 242))
        ),
    ),
)


def admit_known_classes_only() -> None:
    """Unpickles nothing but what the lists above name, in this process from now on. A second call does nothing."""
    install(TABLE)
