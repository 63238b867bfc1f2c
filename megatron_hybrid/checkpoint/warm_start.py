"""From the trained weights of stock layers (``*``, ``W``, ``M``) to those of an intra-layer hybrid (``P``).

Names and tensors are those of a layer in a checkpoint, whole whatever the layout: what stands behind
``decoder.layers.N.``. Shapes: h hidden size.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_hybrid.layers.intra.design import IntraDesign
from megatron_hybrid.layers.registry import LAYERS

State = dict[str, Tensor]
KINDS = {symbol: layer.branch for symbol, layer in LAYERS.items() if layer.branch}
"""Symbol of a stock layer to the branch that it can initialise."""


@dataclass(frozen=True)
class Mixer:
    """A stock layer's mixer, by the names of a branch."""

    input_norm: Tensor
    """Weight [h] of the norm in front of it."""
    inputs: State
    """Rows [rows, h] of the input projection by part: q k v, or z x B C dt."""
    core: State
    """What stands between the projections and belongs to the branch."""
    output: Tensor
    """Output projection [h, width]."""
    output_norm: Tensor | None = None
    """Weight [width] of the norm in front of it."""


def stock_sizes(args: Any, symbol: str) -> dict[str, int]:
    """Sizes of a stock mixer by the flags of ours that must equal them.

    Args:
        args: The arguments that a checkpoint was trained with.
        symbol: Of :data:`KINDS`.
    """

    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    heads = get("num_attention_heads")
    if KINDS[symbol] == "attention":
        width = heads * get("kv_channels", args.hidden_size // heads)
        groups = get("num_query_groups", 1) if get("group_query_attention", False) else heads
        return _attention_sizes(heads, groups, width, width)
    head_dim = get("mamba_head_dim", 64)
    inner = get("mamba_num_heads", 2 * args.hidden_size // head_dim) * head_dim
    return _mamba_sizes(inner, head_dim, get("mamba_num_groups", 8), get("mamba_state_dim", 128))


def branch_sizes(design: IntraDesign, branch: int) -> dict[str, int]:
    """The same of a branch of a P layer."""
    d = design
    if d.branches[branch] == "attention":
        return _attention_sizes(d.num_attention_heads, d.num_query_groups, d.qk_dim, d.value_dim)
    return _mamba_sizes(d.ssm_dim, d.ssm_head_dim, d.ssm_groups, d.state_dim)


def _attention_sizes(heads: int, groups: int, qk_dim: int, value_dim: int) -> dict[str, int]:
    return {
        "--intra-num-attention-heads": heads,
        "--intra-num-query-groups": groups,
        "--intra-qk-dim": qk_dim,
        "--intra-value-dim": value_dim,
    }


def _mamba_sizes(inner: int, head_dim: int, groups: int, state_dim: int) -> dict[str, int]:
    return {
        "--intra-ssm-dim": inner,
        "--intra-ssm-head-dim": head_dim,
        "--mamba-num-groups": groups,
        "--mamba-state-dim": state_dim,
    }


def check_branches(design: IntraDesign, sources: dict[int, tuple[str, Any]]) -> None:
    """Refuses stock layers that do not fit into the branches of a P layer.

    Args:
        design: Of the P layer.
        sources: Branch (0 or 1) to a stock layer's symbol and the arguments that it was trained with.

    Raises:
        ValueError: With the values, the rule and the remedy.
    """
    for branch, (symbol, args) in sources.items():
        name = design.names[branch]
        if KINDS.get(symbol) != design.branches[branch]:
            stock = " or ".join(s for s, kind in KINDS.items() if kind == design.branches[branch])
            raise ValueError(f"The {name} branch takes the weights of a layer {stock}, and is given a layer {symbol}.")
        stock_values, ours = stock_sizes(args, symbol), branch_sizes(design, branch)
        wrong = {flag: value for flag, value in stock_values.items() if value != ours[flag]}
        if wrong:
            listed = ", ".join(f"{flag} is {ours[flag]} and the layer {symbol} has {v}" for flag, v in wrong.items())
            remedy = " ".join(f"{flag} {value}" for flag, value in wrong.items())
            raise ValueError(f"The {name} branch must be as wide as the weights it takes: {listed}. Set {remedy}.")
    if len(sources) == 2 and "fused" in design.out_parts:
        raise ValueError(
            f"--intra-output joint with --intra-fusion {design.fusion} takes both branches through one matrix, and two "
            "stock layers have two. Initialise one branch, or use --intra-output separate."
        )
    if len(sources) == 2 and design.shares_value:
        raise ValueError(
            "--intra-value shared makes both branches read one value, and two stock layers have two. Initialise one "
            "branch, or use --intra-value separate."
        )


def _refuse_biases(layer: State) -> None:
    biases = [name for name in layer if name.endswith(("linear_qkv.bias", "_proj.bias"))]
    if biases:
        raise ValueError(
            f"The stock layer has {', '.join(biases)}, and P layers have no biases in their projections: its weights "
            "alone would be another function."
        )


def attention_mixer(layer: State, heads: int, groups: int) -> Mixer:
    """From a layer ``*`` or ``W``, whose ``linear_qkv`` has for each group its queries, its key and its value."""
    _refuse_biases(layer)
    qkv = layer["self_attention.linear_qkv.weight"]
    per_group = heads // groups
    grouped = qkv.unflatten(0, (groups, per_group + 2, -1))
    q, k, v = (t.flatten(0, 2) for t in grouped.split([per_group, 1, 1], 1))
    return Mixer(
        input_norm=layer["self_attention.linear_qkv.layer_norm_weight"],
        inputs={"q": q, "k": k, "v": v},
        core={},
        output=layer["self_attention.linear_proj.weight"],
    )


def mamba_mixer(layer: State) -> Mixer:
    """From a layer ``M``, which checkpoints store by the parts that its branch has as well."""
    _refuse_biases(layer)
    parts = {name: layer[f"mixer.in_proj.weight.{name}"] for name in ("z", "x", "B", "C", "dt")}
    others = ("in_proj.", "out_proj.", "norm.")
    core = {name.removeprefix("mixer."): t for name, t in layer.items() if name.startswith("mixer.")}
    return Mixer(
        input_norm=layer["mixer.in_proj.layer_norm_weight"],
        inputs=parts,
        core={name: t for name, t in core.items() if not name.startswith(others)},
        output=layer["mixer.out_proj.weight"],
        output_norm=layer["mixer.norm.weight"],
    )


def intra_layer(mixers: dict[int, Mixer], design: IntraDesign) -> State:
    """The tensors of a P layer of which some branches are stock mixers.

    Both branches read one normalised input. Its weight is that of the first mixer; the other one's input projection
    is multiplied by the ratio of the weights, column by column, so that it sees what it saw. A Mamba mixer's norm
    becomes the branch's; where the design has none, its weight goes into the output projection.

    Args:
        mixers: Branch (0 or 1) to mixer, of sizes that :func:`check_branches` accepts.
        design: Of the P layer.

    Returns:
        Tensors by name; those of a branch that is not given, of the scales and of the gate are not among them.
    """
    first = mixers[min(mixers)].input_norm.float()
    shared_norm = first.where(first != 0, first.new_ones(()))  # or nothing could come through for the other
    result = {"self_attention.in_proj.layer_norm_weight": shared_norm}
    for branch, mixer in mixers.items():
        name = design.names[branch]
        ratio = mixer.input_norm.float() / shared_norm
        for letter, rows in mixer.inputs.items():
            if letter == "v":  # values shared with a Mamba branch are not grouped
                repeats = design.value_heads // design.num_query_groups
                rows = rows.unflatten(0, (design.num_query_groups, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
            result[f"self_attention.in_proj.weight.{design.part_name(branch, letter)}"] = rows.float() * ratio
        result |= {f"self_attention.{name}.{key}": tensor for key, tensor in mixer.core.items()}
        output, joint = mixer.output, "fused" in design.out_parts
        if mixer.output_norm is not None:
            if design.norm == "none" or joint:
                output = output.float() * mixer.output_norm.float()
            else:
                result[f"self_attention.fusion.{name}_norm.weight"] = mixer.output_norm
        result[f"self_attention.out_proj.weight.{'fused' if joint else name}"] = output
    return result
