"""Linear layers and parameters, from which parameter counts, FLOPs and memory follow."""

from typing import NamedTuple

from megatron_hybrid.accounting.sizes import Sizes

Linear = tuple[int, int]
"""``(n_in, n_out)``: n_in * n_out weights, and 2 * n_in * n_out FLOPs per token forward."""


class Parameters(NamedTuple):
    """Parameters of one layer; ``active`` leaves out experts that a token is not routed to."""

    total: int
    active: int


class Tensor(NamedTuple):
    """One parameter of the model."""

    size: int
    """Elements."""
    expert: bool = False
    """Of a routed expert."""
    own_bucket: bool = False
    """A copy of the embedding that pipeline stages keep equal: gradient buffers give it a bucket of its own."""


def weights(linears: list[Linear]) -> int:
    """Elements of the weights of linear layers."""
    return sum(n_in * n_out for n_in, n_out in linears)


def dense(sizes: list[int]) -> list[Tensor]:
    """Parameters that belong to no routed expert."""
    return [Tensor(size) for size in sizes]


def linear(shape: Linear, bias: bool) -> list[int]:
    """Weight, and bias if there is one."""
    n_in, n_out = shape
    return [n_in * n_out, n_out] if bias else [n_in * n_out]


def norm_sizes(s: Sizes, width: int | None = None) -> list[int]:
    """Weight, and bias of a LayerNorm, over the hidden size or another width."""
    return [s.hidden if width is None else width] * (1 + s.layer_norm)


def norm(s: Sizes, width: int | None = None) -> int:
    """Parameters of a norm."""
    return sum(norm_sizes(s, width))


def ffn_linears(s: Sizes, width: int) -> list[Linear]:
    """Of a feed-forward network of that width; a gated one has two input projections in one."""
    return [(s.hidden, width * (1 + s.gated)), (width, s.hidden)]


def ffn_tensors(s: Sizes, width: int) -> list[int]:
    """The parameters of a feed-forward network."""
    first, second = ffn_linears(s, width)
    return linear(first, s.bias) + linear(second, s.bias)
