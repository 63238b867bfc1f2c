"""Transformer Engine on a GPU: against torch's layers, in 8 bits, and checkpoints of both. Skipped without either."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

from tests.support import concurrent_runs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < (9, 0)
    or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device from sm90 on and Transformer Engine",
)
RECIPES = ("tensorwise", "delayed", "blockwise")


def fp8(recipe):
    return f"--backend te --fp8-format hybrid --fp8-recipe {recipe}"


# Whole runs ----------------------------------------------------------------------------------------

BF16_BOUND = 3e-3
"""Of a loss. Both backends round to bf16's 8 bits (2^-9 = 2e-3 each time) in another order: logits of a token differ by
some 1e-2, and the mean over 2,048 tokens by a fraction of that; twenty steps of small updates hardly add to it."""
EIGHT_BIT_BOUND = 2e-2
"""Of a loss. e4m3 keeps 4 bits (2^-5 = 3e-2 each time): a product over 256 channels averages that to 2e-3 of its
result's spread, and twelve layers in a row, whose inputs are each rounded again, add to 1e-2 at most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def losses(folder):
    """Of 20 steps by each backend and recipe from the same weights."""
    arms = {"torch": "--backend torch", "te": "--backend te"} | {name: fp8(name) for name in RECIPES}
    load = f"--load {folder / 'start'} --finetune --no-load-rng"
    concurrent_runs.losses(folder, {"start": "--backend torch --train-iters 1 --save-interval 1 --lr 1e-9 --min-lr 0"})
    return concurrent_runs.losses(folder, {name: f"{flags} {load}" for name, flags in arms.items()})


def relative(found, wanted):
    assert len(found) == len(wanted) and all(math.isfinite(loss) for loss in found)
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


def test_losses_are_those_of_torchs_layers(losses):
    assert len(losses["torch"]) == 20 and losses["torch"][-1] < losses["torch"][0] - 0.1
    assert relative(losses["te"], losses["torch"]) < BF16_BOUND


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_in_8_bits(losses, recipe):
    assert relative(losses[recipe], losses["te"]) < EIGHT_BIT_BOUND
    assert losses[recipe] != losses["te"], "nothing was in 8 bits"


@pytest.fixture(scope="module")
def crossed(folder, losses):
    """Steps 11 to 20 from a checkpoint of step 10 of another backend or precision: those, and the saving run's own."""
    pairs = {
        "torch to te": ("torch", "--backend te"),
        "te to torch": ("te", "--backend torch"),
        "delayed to torch": ("delayed", "--backend torch"),
        "torch to delayed": ("torch", fp8("delayed")),
        "delayed to delayed": ("delayed", fp8("delayed")),
    }
    arms = {
        name.replace(" ", "-"): f"{flags} --load {folder / saved} --ckpt-step 10"
        for name, (saved, flags) in pairs.items()
    }
    found = concurrent_runs.losses(folder, arms)
    return {name: (found[name.replace(" ", "-")], losses[saved][10:]) for name, (saved, _) in pairs.items()}


@pytest.mark.parametrize(
    ("direction", "bound"),
    [
        ("torch to te", BF16_BOUND),
        ("te to torch", BF16_BOUND),
        ("delayed to torch", EIGHT_BIT_BOUND),
        ("torch to delayed", EIGHT_BIT_BOUND),
        ("delayed to delayed", BF16_BOUND),
    ],
)
def test_checkpoints_cross(crossed, direction, bound):
    found, wanted = crossed[direction]
    assert len(found) == 10
    assert relative(found, wanted) < bound


# The padded linear -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """``linear(rows, fuse)``: our linear with its norm, weights in bf16, always of the same values."""
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_hybrid.layers.aligned_te_linear import AlignedNormColumnLinear

    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()

    def make(rows, fuse=False, keeps_padding=False):
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=256,
            num_attention_heads=4,
            params_dtype=torch.bfloat16,
            bf16=True,
            normalization="RMSNorm",
            gradient_accumulation_fusion=fuse,
        )
        made = AlignedNormColumnLinear(
            256,
            rows,
            config=config,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=0.1),
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=mpu.get_tensor_model_parallel_group(),
            keeps_padding=keeps_padding,
        )
        torch.nn.init.normal_(made.layer_norm_weight, mean=1.0, std=0.1)
        return made

    yield make
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def autocast(recipe):
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch import fp8_autocast

    made = {
        None: None,
        "tensorwise": recipes.Float8CurrentScaling,
        "delayed": recipes.DelayedScaling,
        "blockwise": recipes.Float8BlockScaling,
    }[recipe]
    return fp8_autocast(enabled=recipe is not None, fp8_recipe=made() if made else None)


def errors(layer, recipe):
    """Output and gradients against float64, relative to the largest entry of each."""
    torch.manual_seed(2)
    x = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # delayed scaling knows the first pass's largest entries in the second
        x.grad = layer.weight.grad = layer.layer_norm_weight.grad = None
        with autocast(recipe):
            y, bias = layer(x)
        assert bias is None
        dy = torch.randn(y.shape, device="cuda", dtype=y.dtype, generator=torch.Generator("cuda").manual_seed(3))
        y.backward(dy)
    weight, scale = (p.detach().double().cpu().requires_grad_() for p in (layer.weight, layer.layer_norm_weight))
    exact = x.detach().double().cpu().requires_grad_()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + layer.eps) * scale
    wanted = normed @ weight.T
    wanted.backward(dy[..., : len(weight)].double().cpu())
    own = layer.weight.grad if layer.weight.grad is not None else layer.weight.main_grad
    pairs = {
        "y": (y[..., : len(weight)], wanted),
        "dx": (x.grad, exact.grad),
        "dw": (own, weight.grad),
        "dscale": (layer.layer_norm_weight.grad, scale.grad),
    }
    return {
        name: ((a.double().cpu() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items() if a is not None
    }, y


@pytest.mark.parametrize("rows", [250, 248, 256, 1])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_padded_linear(linear, rows, recipe):
    """bf16: 2^-9 for an entry, and as much for the norm of many. 8 bits: e4m3 2^-5, gradients in e5m2 2^-4, evenly
    spread in between: 0.03 for two factors, 0.05 for gradients; a half more is left."""
    layer = linear(rows)
    found, y = errors(layer, recipe)
    assert y.shape == (64, 4, rows)
    assert layer.weight.shape == layer.weight.grad.shape == (rows, 256)
    bound = 8e-3 if recipe is None else 8e-2
    assert {name: error for name, error in found.items() if not error < bound} == {}
    if recipe is not None:
        assert found["y"] > 8e-3, "it was not in 8 bits"


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_padding_may_be_kept(linear, recipe):
    layer = linear(250, keeps_padding=True)
    _, y = errors(layer, recipe)
    assert y.shape[-1] == 256
    assert torch.equal(y[..., 250:], torch.zeros_like(y[..., 250:]))


@pytest.mark.parametrize(
    ("rows", "recipe", "fused"), [(256, "tensorwise", True), (248, None, True), (250, None, False)]
)
def test_gradients_are_fused_where_nothing_is_padded(linear, rows, recipe, fused):
    layer = linear(rows, fuse=True)
    layer.weight.main_grad = torch.zeros(rows, 256, device="cuda")
    layer.weight.grad_added_to_main_grad = False
    layer.is_first_microbatch = False  # the first one of a step overwrites the buffer, others add to it
    found, _ = errors_of_one_pass(layer, recipe)
    assert layer.fuse_wgrad_accumulation == fused
    assert (layer.weight.main_grad != 0).any() == fused
    assert layer.weight.grad_added_to_main_grad == fused
    assert found < (8e-2 if recipe else 8e-3)


def errors_of_one_pass(layer, recipe):
    """Of the weight's gradient after one pass, wherever it is."""
    torch.manual_seed(2)
    x = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with autocast(recipe):
        y, _ = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    scale = layer.layer_norm_weight.detach().double()
    exact = x.detach().double()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + layer.eps) * scale
    wanted = dy.double().flatten(0, 1).T @ normed.flatten(0, 1)
    own = layer.weight.main_grad if layer.fuse_wgrad_accumulation else layer.weight.grad
    return ((own.double() - wanted).norm() / wanted.norm()).item(), SimpleNamespace(y=y)
