"""The Triton core with mamba_ssm's signature beside torch's, which has its own tests; by Triton's interpreter."""

import inspect

import pytest
import torch

from megatron_hybrid.kernels import combined, ssm_kernels

pytestmark = pytest.mark.triton_interpreter


def make_inputs(heads, head_dim, groups, state, length, generator):
    inner, c = heads * head_dim, heads * head_dim + 2 * groups * state
    shapes = {
        "zxbcdt": (2, length, inner + c + heads),
        "conv1d_weight": (c, 4),
        "conv1d_bias": (c,),
        "dt_bias": (heads,),
        "A": (heads,),
        "D": (heads,),
    }
    made = {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}
    made["A"] = -made["A"].abs() - 0.1
    return {name: t.requires_grad_() for name, t in made.items()}


def outputs_and_gradients(function, inputs, dy, **options):
    y = function(**inputs, chunk_size=128, ngroups=1, **options)
    return y, *torch.autograd.grad(y, tuple(inputs.values()), dy)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_torch(packed):
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(2, 16, 1, 16, 70, generator)
    ids = torch.tensor([[0] * 33 + [1] * 37, [2] * 70]).int() if packed else None
    dy = torch.randn(2, 70, 32, generator=generator)
    ours, wanted = (
        outputs_and_gradients(kernels.split_conv1d_scan, inputs, dy, seq_idx=ids, headdim=16)
        for kernels in (ssm_kernels("cpu", "triton"), ssm_kernels("cpu", "torch"))
    )
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_signature_is_that_of_torch():
    ours = ssm_kernels("cpu", "triton").split_conv1d_scan
    assert inspect.signature(ours) == inspect.signature(combined.mamba_split_conv1d_scan_combined)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rmsnorm_weight": torch.ones(32)}, "rmsnorm_weight"),
        ({"activation": None}, "activation is None"),
        ({"headdim": None}, "pass headdim"),
    ],
    ids=["norm", "activation", "headdim"],
)
def test_what_the_kernels_lack_is_named(options, words):
    inputs = make_inputs(2, 16, 1, 16, 3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=words):
        ssm_kernels("cpu", "triton").split_conv1d_scan(**inputs, **{"chunk_size": 128, "headdim": 16} | options)
