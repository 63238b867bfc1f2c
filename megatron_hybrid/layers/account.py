"""What a layer states about its costs. Pure Python: a plan needs it where there is neither torch nor Megatron."""

from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.saved import Rank, Saved
from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Parameters, Tensor, weights
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch


class NotDeclared(ValueError):
    """A cost is asked of a layer that does not state it."""


class Account:
    """The costs of one kind of layer.

    A layer defines every method and attribute below ("Declared by each layer"). What it leaves out raises
    :class:`NotDeclared`, by its name, once something asks for it: no cost is silently zero.

    ``s`` is always a :class:`~megatron_hybrid.accounting.sizes.Sizes`: of whole layers, or of one tensor-parallel
    rank's share, which has the same fields.
    """

    symbol: str = "?"
    """Set by the registry, as is ``name``."""
    name: str = "not registered"

    # Declared by each layer ---------------------------------------------------------------------

    empty_mlp: bool
    """It is a ``TransformerLayer`` without an FFN of its own: --recompute-modules mlp keeps the empty one's output."""
    recompute: Mapping[str, tuple[str, ...]]
    """Flag (``--recompute-modules``, ``--hybrid-recompute``) to the values of it that recompute parts of the layer and
    that ``--fit`` tries."""

    def linears(self, s: Sizes) -> list[Linear]:
        """The linear layers that a token meets."""
        self._missing("its linear layers", "linears")

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        """The parameters on one rank, its input norm included, in the order of ``module.parameters()``.

        That is the order of registration of backend ``torch``; in ``te`` norms come inside of the linear layers.

        Args:
            whole: Of the whole layer.
            s: Of one of ``tp`` ranks' share.
        """
        self._missing("its parameters", "tensors")

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        """All linear layers on one rank whose products ``--fp8-format`` runs in 8 bits, rows of zeros included.

        Args:
            whole, s, tp: As of ``tensors``.
        """
        self._missing("which of its products run in 8 bits", "eight_bit_linears")

    def conv_flops(self, s: Sizes) -> float:
        """Forward FLOPs per token of convolutions."""
        self._missing("the FLOPs of its convolutions", "conv_flops")

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        """Forward FLOPs per token of what mixes tokens, without projections and convolutions."""
        self._missing("the FLOPs of its core", "core_flops")

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        """Forward FLOPs per token that selective recomputation of ``modules`` runs again."""
        self._missing("the FLOPs that recomputation repeats", "recomputed_flops")

    def cache(self, s: Sizes, length: int) -> Cache:
        """Elements that generation keeps of a context of ``length`` tokens, for one sequence."""
        self._missing("its cache", "cache")

    def saved(self, r: Rank) -> list[Saved]:
        """What is kept for the backward pass behind the input norm's output, one line a storage."""
        self._missing("the tensors that it saves for the backward pass", "saved")

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        """Where a rank communicates for one micro-batch."""
        self._missing("its communication", "exchanges")

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        """Parameters that tensor-parallel ranks have in common while each sees a share of the gradient."""
        self._missing("the parameters that ranks share", "shared_by_ranks")

    def not_cut(self, s: Sizes) -> int:
        """Parameters that sequence parallelism sums over ranks: norms, biases behind row-parallel linears, routers."""
        self._missing("the parameters that are not cut", "not_cut")

    # With a default -----------------------------------------------------------------------------

    def eight_bit_flops(self, whole: Sizes, tp: int) -> float:
        """Forward FLOPs per token, of all ranks together, of the products that ``--fp8-format`` runs in 8 bits."""
        return 2 * weights(self.eight_bit_linears(whole, whole, tp))

    def reads_in_8_bits(self, whole: Sizes, tp: int) -> bool:
        """Whether the linear behind the input norm is one of these, and alone reads the norm's output."""
        return True

    stored_settings: tuple[str, ...] = ()
    """Arguments that change what the layer computes but no shape: a run that resumes must have the checkpoint's."""

    may_differ: tuple[str, ...] = ()
    """Names of ``stored_differences`` that --allow-changed may name."""

    def sizes(self, args: Any) -> Any:
        """Sizes of its own, from Megatron's arguments and ours: a frozen dataclass with ``shard(tp)``, or None."""
        return None

    def stored_differences(self, stored: Any, args: Any) -> dict[str, tuple[Any, Any]]:
        """What differs between a checkpoint's arguments and a run's beside ``stored_settings``: name to both values."""
        return {}

    def measured(self, args: Any) -> str | None:
        """``module:function`` of what the layers measure of themselves for metrics.jsonl, or None.

        The function takes the model's chunks, on every rank, and returns ``{name: {layer number: value}}``.
        """
        return None

    def describe(self, args: Any) -> dict[str, str]:
        """Rows of ``--print-config``."""
        return {}

    def kernels(self, args: Any) -> str | None:
        """What computes the layer's core in a run of these arguments, in a few words; None: nothing to choose."""
        return None

    # For who adds up ----------------------------------------------------------------------------

    def parameters(self, s: Sizes) -> Parameters:
        """Parameters of a layer of these sizes; all of them active unless some are experts'."""
        total = sum(t.size for t in self.tensors(s, s, 1))
        return Parameters(total, total)

    def flops(self, s: Sizes) -> float:
        """Forward FLOPs per token, convention ``model``."""
        return 2 * weights(self.linears(s)) + self.conv_flops(s) + self.core_flops(s, "model")

    def between_projections(self, s: Sizes) -> float:
        """Forward FLOPs per token without the linear layers."""
        return self.flops(s) - 2 * weights(self.linears(s))

    def _missing(self, what: str, method: str) -> NoReturn:
        raise NotDeclared(
            f"The layer {self.symbol} ({self.name}) does not declare {what}: define {method} in "
            f"{type(self).__module__}.{type(self).__qualname__}."
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("empty_mlp", "recompute"):
            self._missing(name, name)
        raise AttributeError(name)
