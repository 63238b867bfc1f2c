"""What a model remembers of a context when it generates: keys and values, and the states of its recurrent layers.

Counts are elements of one sequence; :meth:`Cache.size` makes bytes of them. In bf16 they are the formulas of
arXiv:2510.04800 (Table 1): 2 L n_kv (d_k + d_v) bytes for attention, which is 4 L d_head n_kv where keys and values are
equally wide, and 2 (d_ssm N + N_conv (2 N + d_ssm)) for Mamba-2. The paper has one group of B and C; here there are
``groups``, and 2 N becomes 2 groups N.
"""

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern

CONTEXT_LENGTHS = tuple(2**power for power in range(12, 21))
"""4K to 1M tokens."""


def layer_cache(symbol: str, sizes: Sizes, length: int) -> Cache:
    """Of one layer after ``length`` tokens.

    Of a rank's share (:meth:`Sizes.shard`) it is what the rank keeps: where there are fewer key heads or groups than
    ranks, each has one of its own.

    Raises:
        ValueError: The symbol is not a layer.
    """
    return account(symbol).cache(sizes, length)


def model_cache(pattern: Pattern, sizes: Sizes, length: int) -> Cache:
    """Of all layers after ``length`` tokens. Prediction heads have none: plain generation does not run them."""
    total = Cache()
    for symbol in pattern.layers:
        total = total.plus(layer_cache(symbol, sizes, length))
    return total
