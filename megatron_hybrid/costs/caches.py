"""What a model remembers of a context when it generates: keys and values, and the states of its recurrent layers.

Counts are elements of one sequence; :meth:`Cache.size` makes bytes of them. In bf16 they are the formulas of
arXiv:2510.04800 (Table 1): 2 L n_kv (d_k + d_v) bytes for attention, which is 4 L d_head n_kv where keys and values are
equally wide, and 2 (d_ssm N + N_conv (2 N + d_ssm)) for Mamba-2. The paper has one group of B and C; here there are
``groups``, and 2 N becomes 2 groups N.
"""

from typing import NamedTuple

from megatron_hybrid.costs.parameters import delta_conv, intra
from megatron_hybrid.costs.sizes import Sizes
from megatron_hybrid.layers.intra.design import CONV_WIDTH, IntraDesign
from megatron_hybrid.pattern import LAYERS, Pattern

CONTEXT_LENGTHS = tuple(2**power for power in range(12, 21))
"""4K to 1M tokens."""


class Cache(NamedTuple):
    """Elements that are kept of one sequence."""

    key_value: int = 0
    """Keys and values: they grow with the context, up to the window where there is one."""
    conv: int = 0
    """The last inputs of the convolutions."""
    state: int = 0
    """Recurrent states."""

    def size(self, element_bytes: int = 2, state_bytes: int = 2) -> int:
        """Bytes; ``state_bytes`` for each element of a recurrent state, which often stays in fp32 (4)."""
        return (self.key_value + self.conv) * element_bytes + self.state * state_bytes

    def plus(self, other: "Cache") -> "Cache":
        """The sum, part by part."""
        return Cache(*(a + b for a, b in zip(self, other, strict=True)))


def layer_cache(symbol: str, sizes: Sizes, length: int) -> Cache:
    """Of one layer after ``length`` tokens.

    Of a rank's share (:meth:`Sizes.shard`) it is what the rank keeps: where there are fewer key heads or groups than
    ranks, each has one of its own.

    Raises:
        ValueError: The symbol is not a layer.
    """
    s = sizes
    if symbol in "*W":
        positions = _positions(length, s.window if symbol == "W" else None, s.sinks)
        return Cache(key_value=positions * max(1, s.query_groups) * 2 * s.head_dim)
    if symbol == "M":
        return _mamba(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim)
    if symbol == "P":
        return _intra(intra(s), length)
    if symbol == "G":
        # core/ssm/gated_delta_net: a convolution over q, k and v, and one [key, value] matrix for each value head
        state = s.delta_value_heads * s.delta_key_dim * s.delta_value_dim
        return Cache(conv=delta_conv(s), state=state)
    if symbol not in LAYERS:
        raise ValueError(f"{symbol!r} is not a layer; the layers are {' '.join(LAYERS)}")
    return Cache()


def model_cache(pattern: Pattern, sizes: Sizes, length: int) -> Cache:
    """Of all layers after ``length`` tokens. Prediction heads have none: plain generation does not run them."""
    total = Cache()
    for symbol in pattern.layers:
        total = total.plus(layer_cache(symbol, sizes, length))
    return total


def _positions(length: int, window: int | None, sinks: int) -> int:
    """Positions whose keys a later query can still see: those in the window, and the sinks."""
    return length if window is None else min(length, window + sinks)


def _mamba(inner: int, groups: int, state_dim: int) -> Cache:
    """A state [head_dim, N] for each head, and the convolution's window of x, B and C.

    All CONV_WIDTH positions of the window are kept, as in the paper and upstream (core/ssm/mamba_mixer.py, conv_state),
    though the last CONV_WIDTH - 1 would do.
    """
    return Cache(conv=CONV_WIDTH * (inner + 2 * groups * state_dim), state=inner * state_dim)


def _intra(d: IntraDesign, length: int) -> Cache:
    """Both branches.

    Two attention branches that share their values keep them once. Values that are the Mamba branch's x save nothing:
    attention reads x before the convolution at every position, the state is made of x behind it, and the convolution
    keeps its own window. They cost more than values of their own, since every query head has its part of x: these are
    not grouped.
    """
    positions = _positions(length, d.window, d.sinks)
    total, kept = Cache(), set()
    for branch, kind in enumerate(d.branches):
        if kind == "mamba":
            total = total.plus(_mamba(d.ssm_dim, d.ssm_groups, d.state_dim))
            continue
        widths = {"k": d.num_query_groups * d.qk_head_dim, "v": d.value_heads * d.value_head_dim}
        for letter, width in widths.items():
            name = d.part_name(branch, letter)
            if name not in kept:
                kept.add(name)
                total = total.plus(Cache(key_value=positions * width))
    return total
