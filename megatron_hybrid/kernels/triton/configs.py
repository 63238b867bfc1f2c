"""Sizes of blocks, warps and stages of the Triton kernels: fixed, so that no run starts with a search.

Each line was the fastest of a search on one H200 (tools/benchmarks) unless its comment says otherwise. A kernel gets
its line as keyword arguments of its launch. Results do not depend on time or machine, but the order of sums, and so the
last bits, depend on the line.
"""

from collections.abc import Mapping

TABLE: dict[tuple[str, str], Mapping[str, int]] = {
    # (kernel, shape class): arguments of its launch
    # causal_conv: channels of a block, tokens that a program steps through; class: bytes of an element
    # chosen by registers and bytes in flight, not yet by a search
    ("causal_conv_forward", "2"): {"CHANNELS": 256, "TOKENS": 64, "num_warps": 1},
    ("causal_conv_forward", "4"): {"CHANNELS": 128, "TOKENS": 64, "num_warps": 1},
    ("causal_conv_backward", "2"): {"CHANNELS": 128, "TOKENS": 128, "num_warps": 1},
    ("causal_conv_backward", "4"): {"CHANNELS": 128, "TOKENS": 128, "num_warps": 1},
}


def launch_options(kernel: str, shape_class: str) -> dict[str, int]:
    """The line of a kernel for a class of shapes.

    Raises:
        KeyError: The table has no such line.
    """
    return dict(TABLE[kernel, shape_class])
