"""Sizes of blocks, warps and stages of the Triton kernels: fixed, so that no run starts with a search.

Each line was the fastest of a search on one H200 (tools/benchmarks) unless its comment says otherwise. A kernel gets
its line as keyword arguments of its launch. Results do not depend on time or machine, but the order of sums, and so the
last bits, depend on the line.
"""

from collections.abc import Mapping

TABLE: dict[tuple[str, str], Mapping[str, int]] = {
    # (kernel, shape class): arguments of its launch
    # causal_conv: channels of a block, tokens that a program steps through (a multiple of 4), stages of its loads;
    # class: bytes of an element, and whether there are documents (tools/benchmarks/convolution.py).
    # Those with documents, and those of 4 bytes: by registers and bytes in flight, not yet by a search.
    ("causal_conv_forward", "2"): {"CHANNELS": 128, "TOKENS": 64, "STAGES": 1, "num_warps": 1},
    ("causal_conv_forward", "4"): {"CHANNELS": 128, "TOKENS": 64, "STAGES": 1, "num_warps": 1},
    ("causal_conv_forward", "2 documents"): {"CHANNELS": 128, "TOKENS": 64, "STAGES": 1, "num_warps": 1},
    ("causal_conv_forward", "4 documents"): {"CHANNELS": 128, "TOKENS": 64, "STAGES": 1, "num_warps": 1},
    ("causal_conv_backward", "2"): {"CHANNELS": 128, "TOKENS": 128, "STAGES": 3, "num_warps": 1, "maxnreg": 128},
    ("causal_conv_backward", "4"): {"CHANNELS": 128, "TOKENS": 128, "STAGES": 1, "num_warps": 1},
    ("causal_conv_backward", "2 documents"): {"CHANNELS": 128, "TOKENS": 128, "STAGES": 1, "num_warps": 1},
    ("causal_conv_backward", "4 documents"): {"CHANNELS": 128, "TOKENS": 128, "STAGES": 1, "num_warps": 1},
    # Mamba-2 scan: channels of a head in a tile; PROGRAMS: how many keep a GPU busy, and the heads of a group are split
    # over more programs only below that; class: bytes of an element. In 2 bytes never fewer than 64 channels, also for
    # smaller heads: with tiles of 32, products were wrong on an H200 (Triton 3.6).
    ("scan_forward", "2"): {"CHANNELS": 64, "num_warps": 4, "STAGES": 4},
    ("scan_forward", "4"): {"CHANNELS": 32, "num_warps": 4, "STAGES": 1},
    ("scan_backward", "2"): {"CHANNELS": 64, "num_warps": 4, "STAGES": 3},
    ("scan_backward", "4"): {"CHANNELS": 32, "num_warps": 4, "STAGES": 1},
    ("scan_output", "2"): {"CHANNELS": 64, "PROGRAMS": 512, "num_warps": 4, "STAGES": 3},
    ("scan_output", "4"): {"CHANNELS": 32, "PROGRAMS": 512, "num_warps": 4, "STAGES": 1},
    ("scan_output_backward", "2"): {"CHANNELS": 64, "PROGRAMS": 512, "num_warps": 4, "STAGES": 2},
    ("scan_output_backward", "4"): {"CHANNELS": 32, "PROGRAMS": 512, "num_warps": 4, "STAGES": 1},
    ("scan_receivers", "2"): {"CHANNELS": 64, "PROGRAMS": 512, "num_warps": 4, "STAGES": 2},
    ("scan_receivers", "4"): {"CHANNELS": 32, "PROGRAMS": 512, "num_warps": 4, "STAGES": 1},
    ("scan_senders", "2"): {"CHANNELS": 64, "num_warps": 4, "STAGES": 1},
    ("scan_senders", "4"): {"CHANNELS": 32, "num_warps": 4, "STAGES": 1},
    # Norms: rows of a tile; programs of a backward pass, as many as 132 multiprocessors have at a time (each adds a row
    # to the sums behind it); stages of its loads. Class: the widest group. Chosen by registers, not yet by a search.
    ("rms_norm_forward", "256"): {"ROWS": 16, "num_warps": 4},
    ("rms_norm_forward", "2048"): {"ROWS": 1, "num_warps": 4},
    ("rms_norm_forward", "4096"): {"ROWS": 1, "num_warps": 8},
    ("rms_norm_forward", "8192"): {"ROWS": 1, "num_warps": 8},
    ("rms_norm_backward", "256"): {"ROWS": 8, "PROGRAMS": 1188, "STAGES": 2, "num_warps": 4},
    ("rms_norm_backward", "2048"): {"ROWS": 1, "PROGRAMS": 792, "STAGES": 2, "num_warps": 4},
    ("rms_norm_backward", "4096"): {"ROWS": 1, "PROGRAMS": 396, "STAGES": 2, "num_warps": 8},
    ("rms_norm_backward", "8192"): {"ROWS": 1, "PROGRAMS": 132, "STAGES": 1, "num_warps": 16},
    ("branch_fusion_forward", "256"): {"ROWS": 16, "num_warps": 4},
    ("branch_fusion_forward", "2048"): {"ROWS": 1, "num_warps": 4},
    ("branch_fusion_forward", "4096"): {"ROWS": 1, "num_warps": 8},
    ("branch_fusion_backward", "256"): {"ROWS": 8, "PROGRAMS": 660, "STAGES": 2, "num_warps": 4},
    ("branch_fusion_backward", "2048"): {"ROWS": 1, "PROGRAMS": 264, "STAGES": 2, "num_warps": 8},
    ("branch_fusion_backward", "4096"): {"ROWS": 1, "PROGRAMS": 132, "STAGES": 2, "num_warps": 16},
    # Cross entropy of a row: entries in a block, blocks on their way; class: entries of a row, at most. Of long rows a
    # program fills a multiprocessor: the rows of all programs may still be in the L2 cache when they are read again.
    # Chosen by registers and bytes in flight, not yet by a search.
    ("cross_entropy", "4096"): {"BLOCK": 2048, "STAGES": 2, "num_warps": 4},
    ("cross_entropy", "32768"): {"BLOCK": 8192, "STAGES": 2, "num_warps": 8},
    ("cross_entropy", "any"): {"BLOCK": 16384, "STAGES": 3, "num_warps": 16},
    # Heads out of a projection, with RoPE: channels of a program; class: bytes of an element. Chosen by registers and
    # bytes in flight, not yet by a search.
    ("rotary", "2"): {"ELEMENTS": 2048, "num_warps": 4},
    ("rotary", "4"): {"ELEMENTS": 2048, "num_warps": 4},
    # Attention: queries (of all heads that a program takes) and keys of a block; class: the greatest head size up to
    # which a line is taken (tools/benchmarks/attention.py). Chosen by registers and occupancy, not yet by a search.
    ("attention_forward", "64"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ("attention_forward", "128"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ("attention_forward", "256"): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    ("attention_query_gradients", "64"): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ("attention_query_gradients", "128"): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    ("attention_query_gradients", "256"): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    ("attention_sink_gradients", "64"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ("attention_sink_gradients", "128"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    ("attention_sink_gradients", "256"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    ("attention_key_value_gradients", "64"): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ("attention_key_value_gradients", "128"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    ("attention_key_value_gradients", "256"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
}


def launch_options(kernel: str, shape_class: str) -> dict[str, int]:
    """The line of a kernel for a class of shapes.

    Raises:
        KeyError: The table has no such line.
    """
    return dict(TABLE[kernel, shape_class])
