"""The Triton convolution compiled for Hopper with the table's lines: registers suffice, and loads are wide."""

import re

import pytest

from megatron_hybrid.kernels.triton import causal_conv, configs
from tests.support.triton_compiler import compiled

POINTERS = {"dy", "x", "weight", "bias", "initial", "out", "dx", "d_initial"}
STRIDES = {"dy_sample", "dy_token", "x_sample", "x_token", "out_sample", "out_token", "dx_sample", "dx_token"}


def resources(name, kernel, size, **changes):
    """``changes``: constants that are not those of a plain Mamba-2 layer."""
    line = configs.launch_options(name, f"{size}{' documents' if changes.get('DOCUMENTS') else ''}")
    constants = dict.fromkeys(("DOCUMENTS", "INITIAL"), False) | dict.fromkeys(("BIAS", "SILU"), True)
    constants |= {"ALIGNED": 16 // size, "WIDTH": 4} | changes | line
    element = {2: "*bf16", 4: "*fp32"}[size]
    arguments = dict.fromkeys(POINTERS, element) | dict.fromkeys(STRIDES, 530) | constants
    arguments |= {"documents": "*i32", "sums": "*fp32", "length": 8192, "channels": 4352}
    return compiled(kernel, arguments, {n: v for n, v in line.items() if n.islower()})


KERNELS = {
    "causal_conv_forward": causal_conv.convolution_kernel,
    "causal_conv_backward": causal_conv.convolution_gradients_kernel,
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("documents", [False, True])
def test_nothing_is_spilled_and_loads_are_wide(name, size, documents):
    found = resources(name, KERNELS[name], size, DOCUMENTS=documents)
    assert found.spilled == 0
    stores = re.findall(r"st\.global(\S*) ", found.ptx)
    assert stores and {width[:3] for width in stores} <= {".v2", ".v4"}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"WIDTH": 2, "BIAS": False},
        {"WIDTH": 3, "INITIAL": True, "DOCUMENTS": True},
        {"WIDTH": 4, "INITIAL": True, "SILU": False, "ALIGNED": 1},
    ],
    ids=str,
)
def test_all_kinds_compile(name, changes):
    assert resources(name, KERNELS[name], 2, **changes).registers
