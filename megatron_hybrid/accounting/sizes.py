"""The sizes that costs depend on, from flags. Imports neither torch nor Megatron."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from megatron_hybrid.argv import flag_name


def setting(args: Any, name: str, default: Any = None) -> Any:
    """A setting of Megatron's arguments or ours; ``default`` where it is absent or None."""
    value = getattr(args, name, None)
    return default if value is None else value


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes that costs depend on. Widths are of the whole model, before any sharding."""

    hidden: int
    padded_vocab: int
    tied: bool = True
    seq_length: int
    layer_norm: bool = False
    """LayerNorm (weight and bias) in place of RMSNorm."""
    bias: bool = False
    """Biases in the linear layers of attention, FFN and router (Mamba, P and G never have any)."""
    qkv_bias: bool = False
    qk_norm: bool = False

    # Attention: * and W.
    heads: int
    query_groups: int
    """Key/value heads; a rank's share may be a fraction of one."""
    head_dim: int
    output_gate: bool = False
    window: int = 512
    """W: tokens that a query sees, itself included, beside the sinks."""
    sinks: int = 64

    # Mamba-2: M, and the SSM branch of P.
    mamba_heads: int
    mamba_head_dim: int = 64
    mamba_groups: int = 8
    state_dim: int = 128

    own: tuple[tuple[str, Any], ...] = ()
    """Symbols of layers with sizes of their own, and these (``Account.sizes``): each has ``shard(tp)``."""

    # FFN: - and E.
    ffn: int
    gated: bool = True
    """Gated activation (SwiGLU): two input projections."""
    experts: int = 0
    """Routed experts: outputs of the router."""
    expert_ranks: int = 1
    """Ranks over which the routed experts are spread."""
    topk: int = 2
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Width of the shared expert; 0 for none."""
    shared_gate: bool = False

    # Gated delta net: G.
    delta_key_heads: int = 16
    delta_value_heads: int = 32
    delta_key_dim: int = 128
    """Per head, as is delta_value_dim."""
    delta_value_dim: int = 128
    delta_conv_width: int = 4

    mtp_repeated: bool = False
    """All MTP heads share one set of weights."""

    @classmethod
    def from_args(cls, args: Any) -> "Sizes":
        """Sizes from Megatron's arguments and ours, with the defaults that the model takes.

        Without those that layers have of their own, which :func:`megatron_hybrid.costs.sizes_of` adds. ``args`` is
        anything with the attributes; what is absent has Megatron's default. Before a tokenizer is known, ``vocab_size``
        is padded as Megatron pads it.

        Raises:
            ValueError: for a missing size, widths that do not divide, or a setting not counted.
        """
        get = partial(setting, args)

        def need(name: str) -> int:
            if get(name) is None:
                raise ValueError(f"{flag_name(name)} is not set; costs depend on it")
            return get(name)

        if get("moe_latent_size"):
            raise ValueError(f"--moe-latent-size {args.moe_latent_size} is not counted here; leave it unset")
        hidden, heads = need("hidden_size"), need("num_attention_heads")
        gated = bool(get("swiglu") or get("quick_geglu") or get("gated_linear_unit"))
        groups = get("num_query_groups", 1) if get("group_query_attention", False) else heads
        # The width that Megatron's arguments.py takes: two thirds of 4h in 64s when SwiGLU.
        plain_ffn = int((4 * hidden * 2 / 3) / 64) * 64 if get("swiglu") else 4 * hidden
        ffn = get("ffn_hidden_size", plain_ffn)
        head_dim = get("mamba_head_dim", 64)
        return cls(
            hidden=hidden,
            padded_vocab=get("padded_vocab_size") or _padded_vocab(args, need("vocab_size")),
            tied=not get("untie_embeddings_and_output_weights", False),
            seq_length=need("seq_length"),
            layer_norm=get("normalization", "LayerNorm") == "LayerNorm",
            bias=get("add_bias_linear", True),
            qkv_bias=get("add_qkv_bias", False),
            qk_norm=get("qk_layernorm", False),
            heads=heads,
            query_groups=groups,
            head_dim=get("kv_channels") or _divide(hidden, heads, "--hidden-size", "heads"),
            output_gate=get("attention_output_gate", False),
            window=get("swa_window", 512),
            sinks=get("swa_sinks", 64),
            mamba_heads=get("mamba_num_heads")
            or _divide(2 * hidden, head_dim, "twice --hidden-size", "--mamba-head-dim"),
            mamba_head_dim=head_dim,
            mamba_groups=get("mamba_num_groups", 8),
            state_dim=get("mamba_state_dim", 128),
            ffn=ffn,
            gated=gated,
            experts=get("num_experts", 0),
            topk=get("moe_router_topk", 2),
            expert_ffn=get("moe_ffn_hidden_size", ffn),
            shared_ffn=get("moe_shared_expert_intermediate_size", 0),
            shared_gate=get("moe_shared_expert_gate", False),
            delta_key_heads=get("linear_num_key_heads", 16),
            delta_value_heads=get("linear_num_value_heads", 32),
            delta_key_dim=get("linear_key_head_dim", 128),
            delta_value_dim=get("linear_value_head_dim", 128),
            delta_conv_width=get("linear_conv_kernel_dim", 4),
            mtp_repeated=get("mtp_use_repeated_layer", False),
        )

    def of(self, symbol: str) -> Any:
        """A layer's own sizes.

        Raises:
            ValueError: These sizes have none for the symbol.
        """
        for known, sizes in self.own:
            if known == symbol:
                return sizes
        raise ValueError(f"the sizes have none of the layer {symbol}; take those of a pattern that has it")

    def shard(self, tp: int, ep: int = 1, etp: int | None = None) -> "Sizes":
        """The sizes of one rank's share of each layer: a layer of these sizes is what the rank has.

        Everything that tensor parallelism cuts is divided. What all ranks have keeps its size: the hidden size, and
        with it norms and the biases of row-parallel layers, the router, B and C of fewer groups than ranks (one group
        each), gates. The key heads of ``*`` and ``W`` are cut even where there are fewer than ranks
        (core/transformer/attention.py:353): Megatron gathers the projection's output then.

        Args:
            tp: Tensor-parallel ranks; ep: expert-parallel ranks; etp: of each expert, default tp.

        Whether widths divide is for the layers' checks to say.
        """
        return _shard(self, tp, ep, tp if etp is None else etp)


@lru_cache(maxsize=1024)  # a plan asks for the same few shares at every layer
def _shard(whole: Sizes, tp: int, ep: int, etp: int) -> Sizes:
    return replace(
        whole,
        padded_vocab=_share(whole.padded_vocab, tp),
        heads=_share(whole.heads, tp),
        query_groups=_share(whole.query_groups, tp),
        mamba_heads=_share(whole.mamba_heads, tp),
        mamba_groups=max(1, whole.mamba_groups // tp),
        own=tuple((symbol, sizes.shard(tp)) for symbol, sizes in whole.own),
        ffn=_share(whole.ffn, tp),
        expert_ranks=ep * whole.expert_ranks,
        expert_ffn=_share(whole.expert_ffn, etp),
        shared_ffn=_share(whole.shared_ffn, tp),
        delta_key_heads=_share(whole.delta_key_heads, tp),
        delta_value_heads=_share(whole.delta_value_heads, tp),
    )


def _share(whole: int, ranks: int) -> int:
    """A rank's share; a fraction where it does not divide, which only layers that are not in the pattern may."""
    return Fraction(whole, ranks) if whole % ranks else whole // ranks  # type: ignore[return-value]


def _padded_vocab(args: Any, vocab_size: int) -> int:
    multiple = (getattr(args, "make_vocab_size_divisible_by", None) or 128) * (
        getattr(args, "tensor_model_parallel_size", None) or 1
    )
    return -(-vocab_size // multiple) * multiple


def _divide(a: int, b: int, a_name: str, b_name: str) -> int:
    if a % b:
        raise ValueError(f"{a_name} is {a}, which does not divide by {b_name} ({b})")
    return a // b
