"""The Triton scan compiled for Hopper with the table's lines: its products are those of tensor cores, and fit."""

import re

import pytest
import triton.language as tl

from megatron_hybrid.kernels.triton import configs, scan_gradient, scan_output, scan_walks
from tests.support.triton_compiler import compiled

KERNELS = {
    "scan_forward": (scan_walks.states_kernel, {}),
    "scan_backward": (scan_walks.state_gradients_kernel, {}),
    "scan_output": (scan_output.output_kernel, {"BACKWARD": False}),
    "scan_output_backward": (scan_output.output_kernel, {"BACKWARD": True}),
    "scan_receivers": (scan_gradient.receivers_kernel, {}),
    "scan_senders": (scan_gradient.senders_kernel, {}),
}
IN_FP32 = {
    "steps", "sums", "first", "last", "overlaps", "D", "d_D", "d_B", "d_C", "d_scores", "d_steps", "d_rows", "d_columns"
}  # fmt: skip
SHARED_MEMORY = 227 * 1024
"""Bytes of a Hopper multiprocessor that programs can have."""


def resources(name, size=2, **changes):
    kernel, own = KERNELS[name]
    line = configs.launch_options(name, str(size))
    element, dtype = {2: ("*bf16", tl.bfloat16), 4: ("*fp32", tl.float32)}[size]
    constants = {
        "HEAD_DIM": 128, "STATE": 128, "STATES": 128, "GROUP": 32, "CHUNK": 64, "ALIGNED": 16 // size, "DTYPE": dtype,
        "STORES": True, "HAS_FIRST": False, "HAS_LAST": False, "HAS_Z": True, "HAS_D": True, "HAS_DOCUMENTS": False,
        "WHOLE_CHUNKS": True, "PRECISION": "tf32" if size == 2 else "tf32x3", **own, **line, **changes,
    }  # fmt: skip
    arguments = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            arguments[name] = constants[name]
        elif name == "documents":
            arguments[name] = "*i32"
        elif name in IN_FP32:
            arguments[name] = "*fp32"
        elif re.fullmatch(r"\w+_[bs]|length|heads|chunks|batch|SPLITS|SEGMENT", name):
            arguments[name] = 1060  # a stride of 8480 in eighths
        else:
            arguments[name] = element
    return compiled(kernel, arguments, {n: v for n, v in line.items() if n.islower()})


@pytest.mark.parametrize("name", KERNELS)
def test_two_programs_share_a_multiprocessor(name):
    """Otherwise nothing hides the latency of loads; a few hundred spilled bytes a thread stay in the L1 cache."""
    found = resources(name)
    assert "wgmma.mma_async" in found.ptx and not found.serialized
    assert found.shared <= SHARED_MEMORY // 2
    assert found.spilled <= {"scan_receivers": 256, "scan_senders": 192}.get(name, 0)
    assert not re.findall(r"ld\.global\.b16|cp\.async\.ca\.shared\.global \S+, \S+, 0x2;", found.ptx)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"HEAD_DIM": 192, "STATE": 256, "STATES": 256, "HAS_DOCUMENTS": True},
        {"HEAD_DIM": 16, "STATE": 40, "STATES": 64, "WHOLE_CHUNKS": False, "HAS_FIRST": True, "HAS_LAST": True},
    ],
    ids=str,
)
def test_all_kinds_fit(name, changes):
    assert resources(name, **changes).shared <= SHARED_MEMORY


@pytest.mark.parametrize("name", KERNELS)
def test_fp32_fits(name):
    assert resources(name, 4).shared <= SHARED_MEMORY
