"""The sizes of a model with those that its layers have of their own."""

from dataclasses import replace
from typing import Any

from megatron_hybrid.accounting.sizes import Sizes, setting
from megatron_hybrid.layers.registry import layers_of


def sizes_of(args: Any) -> Sizes:
    """:meth:`Sizes.from_args`, and the own sizes of the layers in the pattern (before there is one: of its mixers).

    Raises:
        ValueError: A size is missing, widths do not divide, or a setting is not counted.
    """
    pattern = setting(args, "hybrid_layer_pattern") or setting(args, "block_mixers", "")
    found = ((layer.symbol, layer.account.sizes(args)) for layer in layers_of(pattern))
    own = tuple((symbol, sizes) for symbol, sizes in found if sizes is not None)
    return replace(Sizes.from_args(args), own=own)
