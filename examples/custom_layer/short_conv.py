"""A gated short convolution as a layer of its own, symbol C: costs, check, flags and registration. Pure Python.

    y = W_out( c * conv(b * x) ),   b, c, x = W_in(h)

A causal depthwise convolution of a few taps between two gates that come from the token, as in LFM2 (Liquid AI, 2025).
``short_conv_mixer.py`` has the module. ``--layers-from short_conv.py`` makes the symbol known.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from megatron_hybrid.accounting.cache import Cache
from megatron_hybrid.accounting.divisibility import check_divides
from megatron_hybrid.accounting.saved import Rank, Saved
from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import Linear, Tensor, dense, norm, norm_sizes
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections
from megatron_hybrid.layers import Account, Layer, register


@dataclass(kw_only=True)
class ShortConvConfig:
    """Flags of the layer: each field is one, and its docstring the help text."""

    short_conv_taps: int = 4
    """C layers: taps of the convolution."""

    short_conv_channels: int | None = None
    """C layers: channels between the projections. Default: --hidden-size."""


@dataclass(frozen=True)
class ShortConvSizes:
    """What the costs depend on beside the model's own sizes."""

    channels: int
    taps: int

    def shard(self, tp: int) -> "ShortConvSizes":
        """The sizes of one tensor-parallel rank's share."""
        return replace(self, channels=self.channels // tp)


def sizes(args: Any) -> ShortConvSizes:
    """The layer's sizes, from the run's arguments."""
    channels = getattr(args, "short_conv_channels", None) or args.hidden_size
    return ShortConvSizes(channels, getattr(args, "short_conv_taps", 4))


class ShortConvAccount(Account):
    """What the layer costs. Leave a method out, and whatever needs it says so by name."""

    empty_mlp = True  # a TransformerLayer without an FFN of its own
    recompute = {}  # no flag recomputes a part of it
    stored_settings = ("short_conv_taps",)

    def sizes(self, args: Any) -> ShortConvSizes:
        return sizes(args)

    def linears(self, s: Sizes) -> list[Linear]:
        channels = s.of(self.symbol).channels
        return [(s.hidden, 3 * channels), (channels, s.hidden)]

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        return self.linears(s)  # both are the backend's

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        own = s.of(self.symbol)
        return dense([*norm_sizes(s), own.channels * own.taps, *(n_in * n_out for n_in, n_out in self.linears(s))])

    def conv_flops(self, s: Sizes) -> float:
        own = s.of(self.symbol)
        return 2 * own.channels * own.taps

    def core_flops(self, s: Sizes, convention: Convention) -> float:
        return 0.0  # nothing else mixes tokens

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        return 0.0

    def cache(self, s: Sizes, length: int) -> Cache:
        own = s.of(self.symbol)
        return Cache(conv=own.channels * (own.taps - 1))

    def saved(self, r: Rank) -> list[Saved]:
        own, t, e = r.s.of(self.symbol), r.tokens, r.e
        padding = r.layout.micro_batch * (own.taps - 1)
        return [
            Saved("b c x", (t, 3 * own.channels), e),
            Saved("input of the convolution", (t + padding, own.channels), e),
            Saved("output of the convolution", (t, own.channels), e),
            Saved("input of the output projection", (t, own.channels), e),
        ]

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        return projections(m)

    def shared_by_ranks(self, s: Sizes, tp: int) -> int:
        return 0

    def not_cut(self, s: Sizes) -> int:
        return norm(s)


def check(args: Namespace) -> None:
    """What the layer needs of flags and layout.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    own = sizes(args)
    if own.taps < 1:
        raise ValueError(f"--short-conv-taps is {own.taps} and must be at least 1.")
    check_divides(
        own.channels, "--short-conv-channels", args.tensor_model_parallel_size, "--tensor-model-parallel-size"
    )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"C layers with --context-parallel-size {args.context_parallel_size}: the convolution needs the tokens of "
            "the rank before, and this example does not fetch them. Set it to 1."
        )


register(
    Layer(
        symbol="C",
        name="gated short convolution",
        kind="mixer",
        attention_bearing=False,
        account=ShortConvAccount(),
        check=check,
        module="short_conv_mixer",
        color="#bbbbbb",
        keeps_documents_apart=False,
        flags=ShortConvConfig,
    )
)
