"""The core of a Mamba-2 layer in Triton against the float64 one, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.triton.mamba import mamba_split_conv_scan
from tests.support.scan_cases import assert_close, core_results, rounded

pytestmark = pytest.mark.triton_interpreter


@pytest.mark.parametrize("case", [{}, {"packed": True, "initial": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "h", "p", "g", "n"), [(1, 2, 16, 1, 16), (67, 4, 16, 2, 8), (64, 1, 32, 1, 16)])
def test_outputs_and_all_gradients(length, h, p, g, n, dtype, case):
    assert_close(core_results(2, length, h, p, g, n, dtype, **case), dtype)


def inputs(s=5, b=2, h=2, p=16, g=1, n=8):
    shapes = [(s, b, 2 * h * p + 2 * g * n + h), (h * p + 2 * g * n, 4), (h * p + 2 * g * n,), (h,), (h,), (h,)]
    return [rounded(*shape, dtype=torch.float32, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def test_a_skip_weight_of_each_channel_is_one_of_each_head_repeated():
    *rest, D = inputs()
    expected = mamba_split_conv_scan(*rest, D, 16, 1)
    assert torch.equal(mamba_split_conv_scan(*rest, D.repeat_interleave(16), 16, 1), expected)


def test_saves_nothing_but_its_inputs():
    """What the backward pass needs besides is computed again."""
    arguments, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        mamba_split_conv_scan(*arguments, 16, 1)
    big = {arguments[0].data_ptr(), arguments[1].data_ptr(), arguments[2].data_ptr()}
    small = set(saved) - big
    assert big <= set(saved)
    assert len(small) <= 3  # dt_bias, A and D of each channel


def test_widths_that_do_not_add_up_are_refused():
    zxbcdt, *rest = inputs()
    with pytest.raises(ValueError, match="the projection is 81 and the convolution 48 channels wide"):
        mamba_split_conv_scan(zxbcdt[..., 1:], *rest, 16, 1)
    with pytest.raises(ValueError, match="a multiple of 3 heads"):
        mamba_split_conv_scan(zxbcdt, *rest, 16, 3)
