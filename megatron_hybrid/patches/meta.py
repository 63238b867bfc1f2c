"""Building a model without memory for its parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_hybrid.patches.patching import Value, replaced


@contextmanager
def meta_device() -> Iterator[None]:
    """Parameters of Megatron modules that are built inside have shapes and dtypes but no storage.

    Megatron allocates with ``device=torch.cuda.current_device()``
    (for example core/tensor_parallel/layers.py, core/ssm/mamba_mixer.py), which overrides
    ``torch.device("meta")``: the call itself must answer "meta".
    """
    answer = Value(lambda: torch.device("meta"))
    with replaced(torch.cuda, "current_device", answer), torch.device("meta"):
        yield
