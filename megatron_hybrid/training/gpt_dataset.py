"""Megatron's GPTDataset with the order of its documents kept by what the data are, not by where they lie."""

import copy
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_hybrid.data.fingerprint import fingerprint


class NotBuilt(ValueError):
    """Flags say that the order of documents has been built, and it has not."""


@dataclass
class ContentGPTDatasetConfig(GPTDatasetConfig):
    """Upstream's, and what the data sets are."""

    contents: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each data set by its prefix; those that are not here are read."""


class ContentGPTDataset(GPTDataset):
    """Adds the data's fingerprint to the key of upstream's index cache, which is of paths and settings otherwise.

    Upstream keeps the key in ``unique_identifiers`` (core/datasets/megatron_dataset.py:63), which a blend's cache takes
    over (core/datasets/blended_dataset.py:76). The order follows from the index, the seed and the sizes, so that one
    that is built again is the same. Its files appear whole, the one that upstream looks for last, so that a run that
    is killed meanwhile leaves no partial cache.
    """

    config: Any

    def _build_document_sample_shuffle_indices(self) -> Any:
        prefix = str(self.dataset_path)
        contents = self.config.contents
        self.unique_identifiers["content"] = contents.get(prefix) or fingerprint(Path(prefix)).content
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda other: other.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode("utf-8"), usedforsecurity=False
        ).hexdigest()
        if self.config.fast_cache_load or self.config.defer_npy_index_mmap:  # which only read, on any rank first
            if not self._description(str(self.config.path_to_cache)).is_file():
                raise NotBuilt(
                    "--dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap read the order of documents in "
                    f"{self.config.path_to_cache}, which has none of {prefix} as it is now for this run's length, seed "
                    "and sizes: start it once without these flags."
                )
        elif not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            self._build_cache()
        return super()._build_document_sample_shuffle_indices()

    def _description(self, cache: str) -> Path:
        """The one of upstream's files that says what the others are."""
        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-description.txt"
        return Path(cache, name)

    def _build_cache(self) -> None:
        """Has upstream write its files into a folder of their own, from where they take their places."""
        own = os.path.join(self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices")
        last = self._description(self.config.path_to_cache or own)
        if last.is_file():
            return
        last.parent.mkdir(parents=True, exist_ok=True)
        config = self.config
        with tempfile.TemporaryDirectory(dir=last.parent, prefix=".building-") as folder:
            self.config = copy.copy(config)
            self.config.path_to_cache = folder
            try:
                super()._build_document_sample_shuffle_indices()
            finally:
                self.config = config
            for file in sorted(Path(folder).iterdir(), key=lambda path: path.name == last.name):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                file.replace(last.with_name(file.name))
