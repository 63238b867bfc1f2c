"""Which layers of trained models a new one starts from, and their tensors by the new model's names."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_hybrid import pattern
from megatron_hybrid.checkpoint import warm_start, weights
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.layers.intra.account import IntraAccount
from megatron_hybrid.layers.intra.design import IntraDesign
from megatron_hybrid.layers.registry import LAYERS


@dataclass(frozen=True)
class Source:
    """A layer of an old model."""

    checkpoint: int
    """Position of its folder behind --from, from 0."""
    layer: int
    """From 1."""


@dataclass(frozen=True)
class Old:
    """A checkpoint to take weights from."""

    folder: str
    args: Any
    """The arguments that it was trained with."""
    shapes: dict[str, tuple[int, ...]]
    """Of all tensors by name."""
    layers: str
    """Symbols without "|"."""
    mtp: tuple[str, int]
    """Layers of a prediction head, and the number of heads."""

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.shapes if key.startswith(prefix)]


Plan = dict[int, Source | dict[str, Source]]
"""New layer to the old one that it is, or for a P layer to the old mixer of each branch."""


def parse_layers(texts: list[str]) -> Plan:
    """Reads what stands behind --layers.

    Raises:
        ValueError: It is neither NEW=OLD nor NEW:BRANCH=OLD,BRANCH=OLD, or names a layer twice.
    """
    old, branch = r"(?:\d+\.)?\d+", r"(?:attention|mamba)[12]?"
    plan: Plan = {}
    for text in texts:
        if not re.fullmatch(rf"\d+(?:={old}|:{branch}={old}(?:,{branch}={old})?)", text):
            raise ValueError(
                f"--layers {text}: write NEW=OLD, or NEW:BRANCH=OLD,BRANCH=OLD such as 3:attention=3,mamba=1 (branches "
                "that are alike are called attention1 and attention2, mamba1 and mamba2)."
            )
        number = int(re.match(r"\d+", text)[0])  # type: ignore[index]
        if number in plan:
            raise ValueError(f"--layers {text}: layer {number} is given twice.")
        if ":" in text:
            pairs = [pair.split("=") for pair in text.split(":")[1].split(",")]
            branches = {name: _source(where) for name, where in pairs}
            if len(branches) < len(pairs):
                raise ValueError(f"--layers {text}: one branch is given twice.")
            plan[number] = branches
        else:
            plan[number] = _source(text.split("=")[1])
    return plan


def complete(plan: Plan, new: str, olds: list[Old], intra: IntraDesign | None) -> Plan:
    """Checks the layers that a user named, and adds those that stand in the same place in the first checkpoint.

    Raises:
        ValueError: A layer or branch that is not there, or symbols that do not fit.
    """
    for number, source in plan.items():
        if not 1 <= number <= len(new):
            raise ValueError(f"--layers {number}: the new model has layers 1 to {len(new)} ({new}).")
        symbol = new[number - 1]
        if isinstance(source, Source):
            if _symbol(source, olds) != symbol:
                raise ValueError(
                    f"--layers {number}={source.layer}: layer {number} is {symbol} and the old one is "
                    f"{_symbol(source, olds)}; only a layer of the same kind can be copied as it is."
                )
            continue
        if intra is None or not isinstance(LAYERS[symbol].account, IntraAccount):
            raise ValueError(f"--layers {number}:...: layer {number} is {symbol}, and only P layers have branches.")
        for name in source:
            if name not in intra.names:
                raise ValueError(f"--layers {number}:{name}=...: the branches are {' and '.join(intra.names)}.")
        given = {intra.names.index(n): (_symbol(s, olds), olds[s.checkpoint].args) for n, s in source.items()}
        warm_start.check_branches(intra, given)
    same = {i: Source(0, i) for i, (a, b) in enumerate(zip(new, olds[0].layers, strict=False), 1) if a == b}
    return {**same, **plan}


def gather(
    plan: Plan, keys: set[str], olds: list[Old], intra: IntraDesign | None, mtp: tuple[str, int]
) -> dict[str, Any]:
    """Reads the tensors of the new model, by its names, that a plan takes from old ones.

    Args:
        plan: Complete.
        keys: All names of the new model.
        olds: The checkpoints.
        intra: Design of P layers.
        mtp: Of the new pattern.
    """
    outer = {key for key in keys if not key.startswith("decoder.layers.") and key in olds[0].shapes}
    if mtp != olds[0].mtp:
        outer = {key for key in outer if not key.startswith("mtp.")}
    result = weights.read_tensors(olds[0].folder, outer)
    for number, source in plan.items():
        here = _prefix(number)
        found: dict[str, Any] = {}
        if isinstance(source, Source):
            wanted = {key.removeprefix(here) for key in keys if key.startswith(here)}
            found = _layer(olds[source.checkpoint], source.layer, wanted)
        elif intra:
            found = _intra(source, olds, intra)
        result |= {here + key: tensor for key, tensor in found.items()}
    return result


def check_shapes(tensors: dict[str, Any], pieces: list[Any], old_args: Any, args: Any) -> None:
    """Refuses tensors that are not those of the new model.

    A vocabulary is padded to a multiple that depends on the layout: two padded lengths are taken for the same
    vocabulary where one exists that has both.

    Args:
        tensors: Old ones by the new model's names.
        pieces: Of the new model (:func:`megatron_hybrid.checkpoint.weights.stored_tensors`).
        old_args: Arguments of the first checkpoint, which has the old vocabulary.
        args: Those of the new run.

    Raises:
        ValueError: With both shapes.
    """
    for piece in pieces:
        if piece.key not in tensors:
            continue
        old, new = tuple(tensors[piece.key].shape), tuple(piece.global_shape)
        padded = piece.allow_shape_mismatch and old[1:] == new[1:]
        if padded:  # real lengths lie above these
            padded = new[0] > old[0] - _vocab_multiple(old_args) and old[0] > new[0] - _vocab_multiple(args)
        if old != new and not padded:
            raise ValueError(
                f"{piece.key} is {old} in the checkpoint and {new} in the new model: give the sizes and the tokenizer "
                "of the old run behind --."
            )
    missing = set(tensors) - {piece.key for piece in pieces}
    if missing:
        raise ValueError(f"The new model has no {', '.join(sorted(missing))}.")


def describe(plan: Plan, new: str, olds: list[Old]) -> str:
    """A line for each layer: where it comes from."""

    def where(source: Source) -> str:
        return f"layer {source.layer} ({_symbol(source, olds)}) of {olds[source.checkpoint].folder}"

    rows = []
    for number, symbol in enumerate(new, 1):
        source = plan.get(number)
        if isinstance(source, dict):
            text = ", ".join(f"{name} from {where(s)}" for name, s in source.items())
        else:
            text = "from " + where(source) if source else "fresh"
        rows.append(f"  {number:>3} {symbol}  {text}")
    return "\n".join(rows)


def _vocab_multiple(args: Any) -> int:
    return args.make_vocab_size_divisible_by * args.tensor_model_parallel_size


def _prefix(layer: int) -> str:
    return f"decoder.layers.{layer - 1}."


def _source(text: str) -> Source:
    folder, _, layer = text.rpartition(".")
    return Source(int(folder) - 1 if folder else 0, int(layer))


def _symbol(source: Source, olds: list[Old]) -> str:
    if not 0 <= source.checkpoint < len(olds):
        raise ValueError(f"--layers {source.checkpoint + 1}.{source.layer}: --from names {len(olds)} folders.")
    layers = olds[source.checkpoint].layers
    if not 1 <= source.layer <= len(layers):
        raise ValueError(f"--layers: {olds[source.checkpoint].folder} has layers 1 to {len(layers)} ({layers}).")
    return layers[source.layer - 1]


def _layer(old: Old, number: int, wanted: set[str] | None = None) -> dict[str, Any]:
    """Tensors of an old layer by their names in it."""
    prefix = _prefix(number)
    missing = sorted(name for name in wanted or () if prefix + name not in old.shapes)
    if missing:
        raise ValueError(
            f"Layer {number} of {old.folder} lacks what the same layer of the new model has: {', '.join(missing)}. "
            "Give the flags of the old run behind --."
        )
    tensors = weights.read_tensors(
        old.folder, old.keys(prefix) if wanted is None else [prefix + name for name in wanted]
    )
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _intra(sources: dict[str, Source], olds: list[Old], intra: IntraDesign) -> dict[str, Any]:
    mixers = {}
    for name, source in sources.items():
        layer = _layer(olds[source.checkpoint], source.layer)
        attention = LAYERS[_symbol(source, olds)].branch == "attention"
        sizes = (intra.num_attention_heads, intra.num_query_groups)
        made = warm_start.attention_mixer(layer, *sizes) if attention else warm_start.mamba_mixer(layer)
        mixers[intra.names.index(name)] = made
    return warm_start.intra_layer(mixers, intra)


def open_old(folder: str, unverified: bool = False) -> Old:
    """Raises: ValueError: no checkpoint there, or not one of a hybrid model."""
    where, args = weights.open_checkpoint(folder, unverified)
    text = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    if not text:
        raise ValueError(f"{folder} is not a checkpoint of a hybrid model: its arguments have no layer pattern.")
    layers = pattern.parse(text)
    return Old(where, args, weights.tensor_shapes(where), layers.layers, (layers.mtp, layers.mtp_depths))


def build(args: Any, device: str) -> Any:
    """The new model, freshly initialised."""
    from megatron_hybrid.model.build import model_config
    from megatron_hybrid.model.loss_head import HybridLossModel
    from megatron_hybrid.model.stack import HybridLayerStack
    from megatron_hybrid.patches import upstream

    upstream.prepare(device, HybridLayerStack, HybridLossModel, args.ssm_kernels)
    with upstream_errors_as_value_errors():
        config = model_config(args)
    return weights.build_on_one_process(config)
