"""Make the initial checkpoint of a model with P layers from trained checkpoints of other patterns.

    python tools/warm_start.py --from runs/inter --layers 3:attention=3,mamba=1 --save runs/start -- \\
        --recipe paper-1b-intra --hybrid-layer-pattern M-P-M- --intra-qk-dim 2048 ...the flags of the new run

Layers count from 1, in the pattern without "|". "3:attention=3,mamba=1" fills the branches of layer 3, a P, with the
mixers of layers 3 (* or W) and 1 (M) of the old model; in "2.7" the 7 is a layer of the second folder behind --from.
"5=7" copies a layer as it is. All other layers, the embedding and the norms come from the first folder, where it has
the same symbol in the same place; what is not found there, branches without a source, scales and gates start fresh.
The new run starts with --load runs/start, in any parallel layout.

What a branch computes then:
- Each branch reads what its stock layer read: where the norms in front of two mixers differ, the ratio of their weights
  goes into one branch's input projection.
- An attention branch equals its layer exactly with --intra-norm none; else the norm behind it is new to it. A W layer's
  window and RoPE base are flags of the run (--intra-window, --rotary-base), not weights.
- A Mamba branch equals its layer exactly with --intra-norm group --intra-norm-groups N, N being --mamba-num-groups:
  its own norm goes over these groups, and that of a P layer over heads unless it is told otherwise. With
  --intra-norm none its norm's weight goes into the output projection, and the norm itself is left out.
- With an output projection for each branch both are added: --intra-fusion diff stores the second one with its sign.
  One for both (--intra-output joint with add or diff) can take one branch alone.
"""

import argparse
import contextlib
import io
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid import pattern
from megatron_hybrid.cli import flags, tool
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.layers.intra.design import IntraDesign, design

# One process holds the whole model; the checkpoint loads in any layout. Batches and data play no part.
ALONE = [
    "--tensor-model-parallel-size=1",
    "--pipeline-model-parallel-size=1",
    "--context-parallel-size=1",
    "--expert-model-parallel-size=1",
    "--expert-tensor-parallel-size=1",
    "--micro-batch-size=1",
    "--global-batch-size=1",
    "--skip-train",
    "--no-save-optim",
    "--no-save-rng",
    "--ckpt-format=torch_dist",
    "--logging-level=30",
]


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
    from megatron_hybrid.checkpoint.warm_start import check_branches

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
        if symbol != "P" or intra is None:
            raise ValueError(f"--layers {number}:...: layer {number} is {symbol}, and only P layers have branches.")
        for name in source:
            if name not in intra.names:
                raise ValueError(f"--layers {number}:{name}=...: the branches are {' and '.join(intra.names)}.")
        given = {intra.names.index(n): (_symbol(s, olds), olds[s.checkpoint].args) for n, s in source.items()}
        check_branches(intra, given)
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
    from megatron_hybrid.checkpoint.weights import read_tensors

    outer = {key for key in keys if not key.startswith("decoder.layers.") and key in olds[0].shapes}
    if mtp != olds[0].mtp:
        outer = {key for key in outer if not key.startswith("mtp.")}
    result = read_tensors(olds[0].folder, outer)
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
    from megatron_hybrid.checkpoint.weights import read_tensors

    prefix = _prefix(number)
    missing = sorted(name for name in wanted or () if prefix + name not in old.shapes)
    if missing:
        raise ValueError(
            f"Layer {number} of {old.folder} lacks what the same layer of the new model has: {', '.join(missing)}. "
            "Give the flags of the old run behind --."
        )
    tensors = read_tensors(old.folder, old.keys(prefix) if wanted is None else [prefix + name for name in wanted])
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _intra(sources: dict[str, Source], olds: list[Old], intra: IntraDesign) -> dict[str, Any]:
    from megatron_hybrid.checkpoint import warm_start

    mixers = {}
    for name, source in sources.items():
        layer = _layer(olds[source.checkpoint], source.layer)
        attention = _symbol(source, olds) != "M"
        sizes = (intra.num_attention_heads, intra.num_query_groups)
        made = warm_start.attention_mixer(layer, *sizes) if attention else warm_start.mamba_mixer(layer)
        mixers[intra.names.index(name)] = made
    return warm_start.intra_layer(mixers, intra)


def open_old(folder: str, unverified: bool = False) -> Old:
    """Raises: ValueError: no checkpoint there, or not one of a hybrid model."""
    from megatron_hybrid.checkpoint import weights

    where, args = weights.open_checkpoint(folder, unverified)
    text = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    if not text:
        raise ValueError(f"{folder} is not a checkpoint of a hybrid model: its arguments have no layer pattern.")
    layers = pattern.parse(text)
    return Old(where, args, weights.tensor_shapes(where), layers.layers, (layers.mtp, layers.mtp_depths))


def make(froms: list[str], layers: list[str], save: Path, run: list[str], unverified: bool = False) -> str:
    """Makes the checkpoint and returns the description of its layers.

    Raises:
        ValueError: A mistake in the flags, or weights that do not fit.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ValueError(f"--save {save} is there already: give a new folder, nothing is overwritten.")
    asked, command = parse_layers(layers), flags.resolve(flags.with_mock_data(run))
    from megatron_hybrid.checkpoint import weights
    from megatron_hybrid.cli import arguments

    device, new = arguments.choose_device(command.device), command.pattern
    layout = f"--hybrid-layer-pattern={new.without_boundaries()}"
    args = arguments.parse([*command.argv, *ALONE, layout], device)
    olds = [open_old(folder, unverified) for folder in froms]
    intra = design(args) if new.counts()["P"] else None
    plan = complete(asked, new.layers, olds, intra)
    model = build(args, device)
    pieces = weights.stored_tensors(model)
    keys = {piece.key for piece in pieces}
    tensors = gather(plan, keys, olds, intra, (new.mtp, new.mtp_depths))
    check_shapes(tensors, pieces, olds[0].args, args)
    weights.fill(model, tensors)
    weights.save_weights(model, save)
    outer = sorted(key for key in keys - set(tensors) if not key.startswith("decoder.layers."))
    fresh = f"\nfresh: {', '.join(outer)}" if outer else ""
    return f"{describe(plan, new.layers, olds)}{fresh}\nsaved to {save}: start the run with --load {save}"


def build(args: Any, device: str) -> Any:
    """The new model, freshly initialised."""
    from megatron_hybrid.checkpoint import weights
    from megatron_hybrid.model.build import model_config
    from megatron_hybrid.model.stack import HybridLayerStack
    from megatron_hybrid.patches import upstream

    upstream.prepare(device, HybridLayerStack)
    with upstream_errors_as_value_errors():
        config = model_config(args)
    return weights.build_on_one_process(config)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--from", dest="froms", nargs="+", required=True, help="folders of trained checkpoints")
    parser.add_argument("--layers", nargs="+", default=[], help="NEW:BRANCH=OLD,BRANCH=OLD or NEW=OLD")
    parser.add_argument("--save", type=Path, required=True, help="folder to make")
    parser.add_argument("--load-unverified", action="store_true", help="also from checkpoints without a manifest")
    known = parser.parse_args(argv[:split])
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream speaks of a training that does not take place
        made = make(known.froms, known.layers, known.save, argv[split + 1 :], known.load_unverified)
    print(made)


if __name__ == "__main__":
    tool.run(main)
