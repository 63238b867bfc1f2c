"""Whether a kernel in Triton can take a tensor."""

import importlib.util
import os
from functools import cache

from torch import Tensor


def can_run(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor: on CUDA, and anywhere under Triton's interpreter."""
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
