"""The kernels of norms and fusion compiled for Hopper with the table's lines: registers suffice, and rows are wide."""

import re

import pytest
import triton

from megatron_hybrid.kernels.triton import branch_fusion, configs, rms_norm
from tests.support.triton_compiler import compiled

FP32 = {"inverses", "inverses1", "inverses2", "sums"}
NUMBERS = {"rows": 32768, "samples": 4, "eps": 1e-5}
KERNELS = {
    "rms_norm_forward": (rms_norm.rms_norm_kernel, {"FACTOR": True}),
    "rms_norm_backward": (rms_norm.rms_norm_gradients_kernel, {"FACTOR": True, "BESIDE": True}),
    "branch_fusion_forward": (
        branch_fusion.fusion_kernel,
        {"SIGN": -1, "NORM": True, "FACTOR1": True, "FACTOR2": True},
    ),
    "branch_fusion_backward": (
        branch_fusion.fusion_gradients_kernel,
        {"SIGN": 1, "NORM": True, "FACTOR1": True, "FACTOR2": True},
    ),
}


def resources(name, width, groups, element, aligned, **changes):
    kernel, constants = KERNELS[name]
    found = dict(configs.launch_options(name, rms_norm.shape_class(width)))
    found.pop("PROGRAMS", None)
    constants = {**constants, "GROUPS": groups, "WIDTH": width, "ALIGNED": aligned, **changes}
    constants |= {"W": triton.next_power_of_2(width), **{n: v for n, v in found.items() if n.isupper()}}
    arguments = {}
    for parameter in kernel.params:
        n = parameter.name
        stride = n.endswith(("_token", "_sample"))
        known = constants | NUMBERS | dict.fromkeys(FP32, "*fp32")
        arguments[n] = width * groups // aligned + 1 if stride else known.get(n, element)
    return compiled(kernel, arguments, {n: v for n, v in found.items() if n.islower()})


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("width", "groups"), [(128, 18), (2048, 1), (4096, 1), (8192, 1)])
def test_nothing_is_spilled_and_rows_are_stored_in_16_bytes(name, width, groups, element):
    if width > branch_fusion.WIDEST_SUM and name.startswith("branch"):
        pytest.skip("torch adds branches with such wide groups")
    found = resources(name, width, groups, element, 8)
    assert found.spilled == 0
    assert ".v4.b32" in re.findall(r"st\.global(\S*) ", found.ptx)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_are_not_aligned_compile(name):
    assert resources(name, 300, 3, "*bf16", 1).registers
    without = {n: False for n in KERNELS[name][1] if n != "SIGN"}
    assert resources(name, 300, 3, "*bf16", 4, **without).registers
