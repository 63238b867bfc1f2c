"""One fixed configuration of each Triton kernel for each class of shapes, in place of autotuning at the start of a run.

``tools/benchmarks/kernels.py --search`` measures others.
"""

from typing import Any

import torch


def config(kernel: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    """The kernel's block sizes and launch options.

    Args:
        kernel: A name of the table.
        sizes: Those that its entry asks for.
    """
    return _TABLE[kernel](dtype, **sizes)


def _scan(channels: int, stages: int, **options: int) -> Any:
    def entry(dtype: torch.dtype, head_dim: int, state: int, heads: int) -> dict[str, Any]:
        """Tiles of CHANNELS of a head's channels; fewer in fp32, whose tiles are larger, and of few heads.

        PROGRAMS: How many programs keep a GPU busy; heads of a group are split over more of them only below that.
        """
        fits = max(16, min(channels, 1 << (head_dim - 1).bit_length()))
        if dtype == torch.float32:
            return {"CHANNELS": min(fits, 32), "num_warps": 4, "num_stages": 1, **options}
        return {"CHANNELS": fits, "num_warps": 4, "num_stages": stages, **options}

    return entry


_TABLE = {
    "scan_states": _scan(64, 3),
    "scan_output": _scan(64, 3, PROGRAMS=512),
    "scan_output_backward": _scan(64, 3, PROGRAMS=512),
    "scan_receivers": _scan(64, 3, PROGRAMS=512),
    "scan_senders": _scan(64, 3),
}
