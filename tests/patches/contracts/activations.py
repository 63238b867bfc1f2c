"""Upstream code that is relied on for activations between the products of FFNs."""

from tests.patches.contract import Contract

_SWIGLU = "core/fusions/fused_bias_swiglu.py"
_C = Contract
CONTRACTS = [
    _C("swiglu_in_one_kernel", _SWIGLU, "swiglu", "y", ("return F.silu(y_1) * y_2",)),
    _C("swiglu_in_one_kernel", _SWIGLU, "SwiGLUFunction.forward", holds=("return swiglu(input)",)),
    _C("gradient_of_swiglu_in_one_kernel", _SWIGLU, "swiglu_back", "g y", ("return torch.cat(",)),
    _C(
        "gradient_of_swiglu_in_one_kernel",
        _SWIGLU,
        "SwiGLUFunction.backward",
        holds=("tmp = swiglu_back(grad_output, input)",),
    ),
    _C("weighted_swiglu_in_one_kernel", _SWIGLU, "weighted_swiglu", "y weights", ("res = swiglu(y) * weights",)),
    _C(
        "weighted_swiglu_in_one_kernel",
        _SWIGLU,
        "WeightedSwiGLUFunction.forward",
        holds=("return weighted_swiglu(input, weights)",),
    ),
    _C(
        "gradients_of_weighted_swiglu_in_one_kernel",
        _SWIGLU,
        "weighted_swiglu_back",
        "g y weights",
        (
            "input_grad = swiglu_back(g * weights, y)",
            "weights_grad = torch.sum(weights_grad, dim=-1, keepdim=True)",
            "return (input_grad.to(input_dtype), weights_grad.to(w_dtype))",
        ),
    ),
    _C(
        "gradients_of_weighted_swiglu_in_one_kernel",
        _SWIGLU,
        "WeightedSwiGLUFunction.backward",
        holds=("weighted_swiglu_back(grad_output, input, weights)\n",),
    ),
]
