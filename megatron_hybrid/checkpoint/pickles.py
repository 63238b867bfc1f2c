"""The pickles of a checkpoint, read before Megatron reads them (:mod:`megatron_hybrid.patches.unpickling`)."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.patches.unpickling import load_object, load_pickle


def check_pickles(folder: Path) -> None:
    """Reads all pickles of a checkpoint, of the format torch_dist or torch, and keeps nothing.

    Raises:
        Refused: With the file and the class.
    """
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        with path.open("rb") as stream:
            load_object(stream, path, "meta")
    common = folder / "common.pt"
    if common.is_file():
        with common.open("rb") as stream:
            load_object(stream, common)
    if (folder / ".metadata").is_file():
        for where, entry in _entries(folder):
            _check_state(load_object(io.BytesIO(entry), where), where)


def _check_state(thing: Any, where: str) -> None:
    """Reads the state of Transformer Engine that an entry may hold: bytes in a tensor [n], uint8, or a list of them."""
    from megatron.core.safe_globals import SafeUnpickler

    parts = thing if isinstance(thing, list | tuple) else [thing]
    for part in parts if "_extra_state" in where else ():
        if torch.is_tensor(part) and part.dtype == torch.uint8 and part.numel():
            with contextlib.suppress(ImportError):  # of a recipe, without Transformer Engine: nothing will read it
                load_pickle(SafeUnpickler(io.BytesIO(part.numpy().tobytes())), where)


def _entries(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each object entry of a checkpoint of the format torch_dist."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    for index, place in sorted((metadata.storage_data or {}).items(), key=lambda pair: pair[1].relative_path):
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            path = folder / place.relative_path
            with path.open("rb") as stream:
                stream.seek(place.offset)
                yield f"{path}, entry {index.fqn}", stream.read(place.length)
