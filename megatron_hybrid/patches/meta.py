"""Building a model without memory for its parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def meta_device() -> Iterator[None]:
    """Parameters of Megatron modules that are built inside have shapes and dtypes but no storage.

    Megatron allocates with ``device=torch.cuda.current_device()``
    (for example core/tensor_parallel/layers.py, core/ssm/mamba_mixer.py), which overrides
    ``torch.device("meta")``: the call itself must answer "meta".
    """
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device
