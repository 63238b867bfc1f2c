"""Products in 8 bits (``--fp8-format``): the recipes that are counted, and the bytes of what they keep.

Read in Transformer Engine 2.20.2 (pytorch/module/layernorm_linear.py, linear.py) for Hopper, whose 8-bit products want
both factors along the summed dimension. So a linear has two 8-bit copies of its weight, one of them transposed, from
the first micro-batch on; and keeps one copy of its input, transposed, in place of the input itself.
"""

from functools import partial
from typing import Any

from megatron_hybrid.accounting.sizes import setting

SCALES = {"tensorwise": 0.0, "delayed": 0.0, "blockwise": 4 / 128}
"""Recipe to bytes of scales for each element of a copy: one for each tensor, or an fp32 one for 128 elements."""
WEIGHT_COPIES = 2
"""Of a weight, one byte an element; scales of blocks of 128 x 128 are not counted."""
NOT_COUNTED = {
    "fp8_param_gather": "weights without a copy in 16 bits",
    "first_last_layers_bf16": "layers that differ in precision",
    "disable_parameter_transpose_cache": "weights that are quantised for each micro-batch",
    "activation_func_fp8_input_store": "activations in 8 bits",
    "fp8_dot_product_attention": "attention in 8 bits",
    "fp8_multi_head_attention": "attention in 8 bits",
}
"""Settings of Megatron with which ``--fp8-format`` is not counted, and why."""


def eight_bit_recipe(args: Any) -> str | None:
    """The recipe of ``--fp8-format``, None without it.

    Raises:
        ValueError: It is not counted.
    """
    get = partial(setting, args)
    if not get("fp8"):
        return None
    recipe = getattr(get("fp8_recipe", "delayed"), "value", get("fp8_recipe", "delayed"))
    if recipe not in SCALES:
        raise ValueError(f"--fp8-recipe {recipe} is not counted here: counted are {', '.join(SCALES)}.")
    for name, reason in NOT_COUNTED.items():
        if get(name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} with --fp8-format means {reason}, which is not counted here. Drop one.")
    return recipe
