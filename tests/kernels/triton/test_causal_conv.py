"""The Triton convolution against the token-by-token reference, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.triton import causal_conv, configs
from tests.support.conv_cases import TOLERANCE, errors, results

pytestmark = pytest.mark.triton_interpreter

CASES = {
    "plain": {},
    "no-bias": {"bias": False},
    "no-silu": {"silu": False},
    "initial": {"initial": True},
    "documents": {"chance": 0.3},
    "documents-initial": {"chance": 0.3, "initial": True, "bias": False},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs along tokens and channels at sizes that the interpreter takes in a second."""
    for key in list(configs.TABLE):
        if key[0].startswith("causal_conv"):
            monkeypatch.setitem(configs.TABLE, key, {"CHANNELS": 16, "TOKENS": 8, "STAGES": 1, "num_warps": 1})


def check(ours, wanted, dtype):
    found = errors(ours, wanted)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("length", "width", "dtype"),
    [
        (1, 4, torch.float32),
        (2, 4, torch.bfloat16),
        (3, 3, torch.float32),
        (8, 2, torch.bfloat16),
        (9, 4, torch.float32),
        (21, 4, torch.bfloat16),
    ],
    ids=str,
)
def test_outputs_and_all_gradients(length, width, dtype, case):
    check(*results(2, length, 24, width, dtype, **CASES[case]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_stay_fp32_and_other_columns_are_not_touched(dtype):
    ours, _ = results(1, 9, 16, 4, dtype, initial=True)
    assert ours["d_weight"].dtype == ours["d_bias"].dtype == torch.float32
    assert ours["y"].dtype == ours["dx"].dtype == ours["d_initial"].dtype == dtype


def test_what_is_not_finite_stays_in_its_document():
    x = torch.ones(1, 12, 16)
    x[:, 3] = torch.nan
    ids = torch.tensor([[0] * 4 + [1] * 8]).int()
    weight, y, dx = torch.ones(16, 4), torch.empty_like(x), torch.empty_like(x)
    causal_conv.causal_conv_forward(x, weight, None, ids, None, True, y)
    assert y[:, 3].isnan().all() and y[:, 4:].isfinite().all()
    causal_conv.causal_conv_backward(torch.ones_like(x), x, weight, None, ids, None, True, dx)
    assert dx[:, 4:].isfinite().all()


def test_mistakes_are_named():
    x, weight = torch.zeros(1, 8, 4), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="w one of"):
        causal_conv.causal_conv_forward(x, torch.zeros(4, 5), None, None, None, True, x)
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv.causal_conv_forward(x, weight, torch.zeros(3), None, None, True, x)
    with pytest.raises(ValueError, match="out has shape .* last stride of 1"):
        causal_conv.causal_conv_forward(x, weight, None, None, None, True, torch.zeros(1, 4, 8).transpose(1, 2))
    with pytest.raises(ValueError, match="at least one token"):
        causal_conv.causal_conv_forward(x[:, :0], weight, None, None, None, True, x[:, :0])
