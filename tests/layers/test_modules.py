"""Each layer against an implementation that is not ours, or against its formula in a few lines of float64.

Our layer runs in fp32 on the CPU engine, with its input norm and its residual, in a process of its own
(single.py); the other implementation gets its weights and runs here. Compared are the output and the gradients of the
input and of every weight.

Tolerance: errors are relative to the largest entry of each tensor. A gradient passes through up to six products
with sums over at most 64 tokens or 168 channels; random fp32 rounding (6e-8 each) gives 1e-6, and 1e-5 leaves room
for cancellation. A wrong term, factor, eps or order of channels shows at 1e-3 or more: `test_a_comparison_can_fail`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import single
from tests.support.plain_torch import dense_attention, relative_errors, rotate, seen

RTOL = 1e-5
EPS = 1e-5  # --norm-epsilon, Megatron's default; the paper's too
HEADS, GROUPS, WIDTH = 4, 2, 8  # of * and W in training.py's SIZES
MAMBA_HEADS, MAMBA_GROUPS, STATE, HEAD = 8, 2, 8, 8


@pytest.fixture(scope="module")
def layer(ranks):
    """``layer(symbol, flags)``: our layer's tensors, see :func:`tests.support.single.layer`."""

    def run(symbol: str, flags: str = "", length: int = 32) -> dict:
        return ranks(1).run(single.layer, symbol=symbol, flags=flags, length=length)[0]

    return run


class Comparison:
    """Our weights as leaves in a dtype of choice, and the comparison at the end."""

    def __init__(self, ours: dict, dtype: torch.dtype = torch.float64):
        self.ours = ours
        self.x = torch.tensor(ours["x"], dtype=dtype, requires_grad=True)
        self.weights = {n: torch.tensor(w, dtype=dtype, requires_grad=True) for n, w in ours["weights"].items()}
        self._left = dict(self.weights)

    def weight(self, name: str) -> Tensor:
        """A weight of ours. All must be asked for, so that none goes unused."""
        self._left.pop(name, None)
        return self.weights[name]

    def errors(self, y: Tensor) -> dict[str, float]:
        """Relative error of our output and of each of our gradients."""
        assert not self._left, f"the comparison does not use {list(self._left)}"
        dy = torch.tensor(self.ours["dy"], dtype=y.dtype)
        dx, *gradients = torch.autograd.grad(y, [self.x, *self.weights.values()], dy)
        names = [f"d {name}" for name in self.weights]
        errors = relative_errors(self.ours, {"y": y, "dx": dx, **dict(zip(names, gradients, strict=True))})
        return {name.removeprefix("d "): error for name, error in errors.items()}

    def agrees(self, y: Tensor) -> None:
        wrong = {name: f"{error:.1e}" for name, error in self.errors(y).items() if not error <= RTOL}
        assert not wrong


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


# Mamba-2 and Llama attention of transformers -----------------------------------------------------


@pytest.mark.parametrize("length", [32, 45])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_layer_is_that_of_transformers(layer, groups, length):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32,
        num_heads=MAMBA_HEADS,
        head_dim=HEAD,
        state_size=STATE,
        n_groups=groups,
        expand=2,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        chunk_size=16,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    compared = Comparison(layer("M", f"--mamba-num-groups {groups}", length), torch.float32)
    names = {name: f"mixer.{name}".replace("conv1d.", "conv1d_") for name, _ in mixer.named_parameters()}
    weights = {theirs: compared.weight(ours) for theirs, ours in names.items()}
    normed = rms_norm(compared.x, compared.weight("norm.weight")).transpose(0, 1)
    compared.agrees(compared.x + torch.func.functional_call(mixer, weights, (normed,)).transpose(0, 1))


def separate(qkv: Tensor) -> list[Tensor]:
    """Q, K and V weights from Megatron's fused one, which holds a group's queries, its key and its value in turn."""
    grouped = qkv.view(GROUPS, (HEADS // GROUPS + 2) * WIDTH, -1)
    parts = grouped.split([HEADS // GROUPS * WIDTH, WIDTH, WIDTH], 1)
    return [part.flatten(0, 1) for part in parts]


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
POSITIONS = {
    "llama3": ("", LLAMA_3),
    "llama3-longer": ("--rotary-base 10000 --rope-scaling-factor 8", {**LLAMA_3, "rope_theta": 1e4, "factor": 8.0}),
    "none": ("--position-embedding-type none", None),
}


def llama_attention(compared: Comparison, rope: dict | None, window: int | None = None) -> Tensor:
    """The layer on transformers' LlamaAttention, as a sum with its input; ``rope`` None turns nothing."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        max_position_embeddings=131072,
        rope_parameters=rope or LLAMA_3,
        attn_implementation="eager",
    )
    attention = LlamaAttention(config, layer_idx=0)
    normed = rms_norm(compared.x, compared.weight("input_layernorm.weight")).transpose(0, 1)
    length = normed.shape[1]
    cos, sin = LlamaRotaryEmbedding(config)(normed, torch.arange(length)[None])
    if rope is None:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    mask = torch.full((length, length), -torch.inf, dtype=normed.dtype).triu(1)[None, None]
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    weights = dict(zip(names, separate(compared.weight("self_attention.linear_qkv.weight")), strict=True))
    weights["o_proj.weight"] = compared.weight("self_attention.linear_proj.weight")
    out, _ = torch.func.functional_call(attention, weights, (normed, (cos, sin), mask))
    return compared.x + out.transpose(0, 1)


@pytest.mark.parametrize("length", [1, 32, 61])
@pytest.mark.parametrize("positions", POSITIONS)
def test_attention_layer_is_that_of_transformers(layer, positions, length):
    flags, rope = POSITIONS[positions]
    compared = Comparison(layer("*", flags, length), torch.float32)
    compared.agrees(llama_attention(compared, rope))


def test_the_comparison_of_attention_sees_the_scaling_of_positions(layer):
    """At 61 tokens most turns are too small for the scaling to matter: prove that what is left does."""
    compared = Comparison(layer("*", "", 61), torch.float32)
    unscaled = {"rope_type": "default", "rope_theta": 500000.0}
    assert compared.errors(llama_attention(compared, unscaled))["y"] > 10 * RTOL


# Formulas ----------------------------------------------------------------------------------------


def window_layer(compared: Comparison, window: int, sinks: int) -> Tensor:
    """The layer W in the terms of its mask."""
    normed = rms_norm(compared.x, compared.weight("input_layernorm.weight"))
    q, k, v = (
        (normed @ w.T).unflatten(-1, (-1, WIDTH)) for w in separate(compared.weight("self_attention.linear_qkv.weight"))
    )
    out = dense_attention(rotate(q, 10000), rotate(k, 10000), v, seen(len(q), window, sinks)).flatten(-2)
    return compared.x + out @ compared.weight("self_attention.linear_proj.weight").T


@pytest.mark.parametrize("length", [5, 32, 61])
@pytest.mark.parametrize(("window", "sinks"), [(9, 3), (4, 0), (1, 1), (512, 64)])
def test_window_layer_is_dense_attention_under_its_mask(layer, window, sinks, length):
    compared = Comparison(layer("W", f"--swa-window {window} --swa-sinks {sinks}", length))
    compared.agrees(window_layer(compared, window, sinks))


@pytest.mark.parametrize("length", [5, 32, 61])
def test_window_layer_is_llamas_where_the_window_is_wide(layer, length):
    compared = Comparison(layer("W", "--swa-window 64", length), torch.float32)
    compared.agrees(llama_attention(compared, {"rope_type": "default", "rope_theta": 10000.0}))


def test_a_comparison_can_fail(layer):
    """A window that is one key too wide is seen by the output and by the gradients."""
    compared = Comparison(layer("W", "--swa-window 9 --swa-sinks 3"))
    errors = compared.errors(window_layer(compared, 10, 3))
    for name in ("y", "dx", "self_attention.linear_qkv.weight"):
        assert errors[name] > 1e-3, name


def swiglu(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """First's upper half gates its lower half."""
    gate, up = (x @ first.T).chunk(2, -1)
    return (F.silu(gate) * up) @ second.T


def test_dense_layer_is_swiglu(layer):
    compared = Comparison(layer("-"))
    normed = rms_norm(compared.x, compared.weight("pre_mlp_layernorm.weight"))
    first, second = compared.weight("mlp.linear_fc1.weight"), compared.weight("mlp.linear_fc2.weight")
    compared.agrees(compared.x + swiglu(normed, first, second))


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("topk", [1, 2])
def test_mixture_of_experts_is_a_loop_over_tokens(layer, topk, length):
    """The bias chooses experts and weighs nothing: the weight is the sigmoid alone, over the chosen ones' sum if
    there are several (core/transformer/moe/moe_utils.py, topk_routing_with_score_function)."""
    compared = Comparison(layer("E", f"--moe-router-topk {topk}", length))
    bias = torch.tensor(compared.ours["buffers"]["mlp.router.expert_bias"], dtype=torch.float64)
    normed = rms_norm(compared.x, compared.weight("pre_mlp_layernorm.weight"))
    router = compared.weight("mlp.router.weight")
    experts = [
        [compared.weight(f"mlp.experts.local_experts.{e}.linear_fc{i}.weight") for i in (1, 2)] for e in range(4)
    ]
    shared = [compared.weight(f"mlp.shared_experts.linear_fc{i}.weight") for i in (1, 2)]
    rows = []
    chosen = set()
    for token in normed.flatten(0, 1):
        scores = torch.sigmoid(router @ token)
        best = torch.argsort(scores.detach() + bias, descending=True)[:topk].tolist()
        chosen.update(best)
        total = 1.0 if topk == 1 else sum(scores[e] for e in best)
        rows.append(swiglu(token, *shared) + sum(scores[e] / total * swiglu(token, *experts[e]) for e in best))
    assert length == 1 or len(chosen) == 4  # else an expert would be compared on nothing
    rows[0] = rows[0] + 0 * sum(w.sum() for expert in experts for w in expert)  # a zero gradient without tokens
    compared.agrees(compared.x + torch.stack(rows).view_as(compared.x))
