"""Norm, factor and fusion of two branches in Triton against their formula, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.triton import configs
from tests.support.norm_cases import TOLERANCE, fusion_errors

pytestmark = pytest.mark.triton_interpreter


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Programs of a backward pass that step through several tiles."""
    for key, line in list(configs.TABLE.items()):
        if key[0] in ("rms_norm_backward", "branch_fusion_backward"):
            monkeypatch.setitem(configs.TABLE, key, {**line, "PROGRAMS": 6})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_factors", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize(
    ("s", "b", "widths", "groups", "fusion"),
    [
        (1, 1, (16, 16), (1, 1), "add"),
        (13, 2, (48, 48), (3, 3), "diff"),
        (21, 1, (40, 24), (5, 3), "concat"),
        (9, 3, (32, 32), None, "diff"),
        (9, 3, (24, 24), None, "add"),
    ],
)
def test_output_and_all_gradients(s, b, widths, groups, fusion, with_factors, dtype):
    found = fusion_errors(s, b, widths, groups, fusion, dtype, with_factors=with_factors)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_branches_in_any_order_in_memory(fusion):
    found = fusion_errors(7, 3, (32, 32), (2, 2), fusion, torch.float32, columns=8, transposed=True)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[torch.float32]} == {}
