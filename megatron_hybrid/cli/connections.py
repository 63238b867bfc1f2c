"""CUDA_DEVICE_MAX_CONNECTIONS, which Megatron asks for and CUDA reads when it starts."""

import os
from collections.abc import MutableMapping, Sequence

from megatron_hybrid.argv import value

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


def set_connections(argv: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Sets it to 1 where Megatron wants that, unless the user has set it; before the first call of CUDA.

    Under tensor and context parallelism Megatron refuses any other value before Blackwell
    (training/arguments.py:1437): with one queue, kernels start in the order of their launch, and communication begins
    before the matrix product that it hides behind. Blackwell is asked for no value, and takes the same one here: to ask
    the device which it is would start CUDA. Without these layouts it stays unset, so that both streams of P layers run
    at once.

    Args:
        argv: Resolved flags.
        environment: Where it is set.

    Returns:
        A note for the user when it was set.
    """
    sizes = [value(list(argv), f"--{kind}-parallel-size", "1") for kind in ("tensor-model", "context")]
    if NAME in environment or all(size == "1" for size in sizes):
        return []
    environment[NAME] = "1"
    return [f"{NAME}=1: Megatron asks for it under tensor and context parallelism"]
