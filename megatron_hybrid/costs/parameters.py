"""Parameters of layers and models: exactly those of the model that is built from the same arguments."""

from dataclasses import dataclass

from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Parameters, Tensor, norm
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import Pattern


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of a model."""

    total: int
    """All."""
    active: int
    """All that a token meets: without the experts that it is not routed to."""
    embedding: int
    """Token embedding, and the output head unless it is tied to it."""

    @property
    def non_embedding(self) -> int:
        """The paper's N."""
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        """The paper's N for a mixture of experts."""
        return self.active - self.embedding


def layer_linears(symbol: str, s: Sizes) -> list[Linear]:
    """The linear layers that a token meets in a layer.

    Raises:
        ValueError: An unknown symbol.
    """
    return account(symbol).linears(s)


def layer_tensors(symbol: str, sizes: Sizes, tp: int = 1, ep: int = 1, etp: int | None = None) -> list[Tensor]:
    """The parameters of one layer on one rank, its input norm included, in the model's order (``Account.tensors``).

    Args:
        sizes: Of the whole layer.
        tp: Tensor-parallel ranks; ep: expert-parallel ranks; etp: of each expert, default tp.

    Raises:
        ValueError: An unknown symbol, or sizes that do not divide.
    """
    return account(symbol).tensors(sizes, sizes.shard(tp, ep, etp), tp)


def layer_parameters(symbol: str, sizes: Sizes) -> Parameters:
    """Parameters of one layer, its input norm included. The expert bias is a buffer: not counted.

    Raises:
        ValueError: An unknown symbol, or sizes that do not divide.
    """
    return account(symbol).parameters(sizes)


def mtp_weights(pattern: Pattern, sizes: Sizes) -> int:
    """Sets of weights of the prediction heads."""
    return min(1, pattern.mtp_depths) if sizes.mtp_repeated else pattern.mtp_depths


def model_parameters(pattern: Pattern, sizes: Sizes) -> ModelParameters:
    """Parameters of a whole model: embedding, layers, final norm, and MTP heads."""
    s = sizes
    embedding = s.padded_vocab * s.hidden * (1 if s.tied else 2)
    layers = [layer_parameters(symbol, s) for symbol in pattern.layers]
    other = norm(s)
    for _ in range(mtp_weights(pattern, s)):
        layers += [layer_parameters(symbol, s) for symbol in pattern.mtp]
        other += 3 * norm(s) + 2 * s.hidden * s.hidden  # its three norms; [state; token] -> state
    return ModelParameters(
        total=embedding + other + sum(p.total for p in layers),
        active=embedding + other + sum(p.active for p in layers),
        embedding=embedding,
    )
