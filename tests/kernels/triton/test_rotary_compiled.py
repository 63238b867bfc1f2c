"""The kernel that splits and rotates, compiled for Hopper with the table's lines: loads are wide and many fit."""

import re

import pytest

from megatron_hybrid.kernels.head_columns import HeadColumns
from megatron_hybrid.kernels.triton import rotary
from tests.support.triton_compiler import Resources, compiled

LLAMA = HeadColumns(groups=8, queries=4, keys=1, values=1, width=64, value_width=64)
INTRA = HeadColumns(groups=1, queries=16, keys=4, values=4, width=72, value_width=128)
REGISTERS = 65536
"""Of a multiprocessor."""


def resources(
    heads: HeadColumns, size: int, back: bool, pairs: int | None = None, interleaved: bool = False, row: int = 0
) -> Resources:
    """Of the kernel for 4 samples; ``row``: columns of the projection, if the heads are not all of them."""
    pairs = heads.width // 2 if pairs is None else pairs
    tiles = rotary.tile(heads, pairs, size)
    strides = {}
    for letter, each, width in zip("QKV", heads[1:4], (heads.width, heads.width, heads.value_width), strict=True):
        count = heads.groups * each
        strides |= {f"{letter}S": 4 * count * width, f"{letter}B": count * width, f"{letter}H": width}
    element = {2: "*bf16", 4: "*fp32"}[size]
    constants = {
        "SAMPLES": 4, "ROW": row or heads.columns, "GROUPS": heads.groups, "QUERIES": heads.queries,
        "KEYS": heads.keys, "VALUES": heads.values, "WIDTH": heads.width, "VALUE_WIDTH": heads.value_width,
        "INTERLEAVED": interleaved, "BACK": back, "MOVE_VALUES": back or heads.groups > 1, **strides, **tiles,
    }  # fmt: skip
    moved = constants["MOVE_VALUES"]
    arguments = dict.fromkeys(("x", "q", "k"), element) | {"v": element if moved else None}
    arguments |= {"table": "*fp32" if pairs else None, "tokens": 32768, "query_programs": 1, "key_programs": 1}
    return compiled(rotary.rotary_kernel, arguments | constants, {n: v for n, v in tiles.items() if n.islower()})


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("heads", "row"), [(LLAMA, 0), (INTRA, 6840)], ids=["llama", "intra"])
def test_nothing_is_spilled_and_loads_are_wide(heads, row, size, back):
    found = resources(heads, size, back, row=row)
    assert found.spilled == 0 and found.shared <= 4096
    assert REGISTERS // (found.registers * 128) >= 8  # programs of a multiprocessor: 32 KB on their way at least
    loads = re.findall(r"ld\.global(\S*) ", found.ptx)
    narrow = [width for width in loads if not width.startswith((".v4", ".v2"))]
    assert loads and not narrow, "half a head of 72 channels in bf16 is 72 bytes: 8 at a time; all others 16"
    if heads is LLAMA:
        assert all(width.startswith(".v4") for width in loads)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("pairs", "interleaved"), [(0, False), (16, False), (16, True), (32, True)], ids=["none", "some", "some-i", "i"]
)
def test_all_kinds_compile(pairs, interleaved, back):
    found = resources(LLAMA, 2, back, pairs, interleaved)
    assert found.spilled == 0
    assert all(width.startswith(".v4") for width in re.findall(r"ld\.global(\S*) ", found.ptx))
