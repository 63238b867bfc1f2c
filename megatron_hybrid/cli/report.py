"""Describes a run: recipe, layout, sizes, data."""

import itertools
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid import costs, pattern
from megatron_hybrid.cli import recipes
from megatron_hybrid.cli.flags import Command
from megatron_hybrid.data import blend
from megatron_hybrid.layers.registry import LAYERS, layers_of


def list_recipes() -> str:
    """A heading for each group and an indented line for each recipe."""
    blocks = []
    for heading, group in itertools.groupby(recipes.recipes(), key=lambda r: r.group):
        named = list(group)
        width = max(len(r.name) for r in named)
        blocks.append("\n".join([heading, *(f"  {r.name:{width}}  {r.summary}" for r in named)]))
    return "\n\n".join(blocks)


def figures(args: Namespace) -> dict[str, Any]:
    """Sizes that follow from the arguments: parameters as counts, FLOPs per token.

    Before the vocabulary is known (``--print-config`` without ``--vocab-size``), parameters are those without the
    embeddings, and ``parameters_embedding`` and the FLOPs are None.
    """
    known = args.padded_vocab_size or args.vocab_size
    layers = pattern.parse(args.hybrid_layer_pattern)
    sizes = costs.sizes_of(args if known else Namespace(**{**vars(args), "vocab_size": 1}))
    parameters = costs.model_parameters(layers, sizes)
    unseen = 0 if known else parameters.embedding
    return {
        "recipe": args.recipe,
        "pattern": args.hybrid_layer_pattern,
        "backend": args.backend,
        "ssm_kernels": args.ssm_kernels,
        "device": args.device,
        "processes": args.world_size,
        "parameters_total": parameters.total - unseen,
        "parameters_active": parameters.active - unseen,
        "parameters_embedding": parameters.embedding if known else None,
        "training_flops_per_token": costs.training_flops_per_token(layers, sizes) if known else None,
    }


def data_draws(args: Namespace) -> list[blend.Draw]:
    """What the run takes from each source of its training data.

    Empty where no table can be made: other data than those of --data-blend or --data-path, several of the latter
    without weights, or an index that another tool wrote.

    Raises:
        ValueError: The file of --data-blend allows fewer epochs of a source; data without a train part.
    """
    if args.mock_data or args.skip_train or not args.data_path:
        return []
    length = run_length(args)
    if args.data_blend:
        drawn = blend.draws(blend.read_blend(Path(args.data_blend)), args.split, length)
        blend.check_epochs(args.data_blend, drawn, length)
        return drawn
    try:
        return blend.draws(blend.sources_of(args.data_path), args.split, length) if args.rank == 0 else []
    except ValueError:
        return []  # these data are upstream's to judge


def run_length(args: Namespace) -> blend.Length | None:
    """How many tokens a run trains on; None where the flags do not say."""
    if args.train_samples:
        return blend.Length("--train-samples", args.train_samples, args.seq_length)
    if args.train_iters and not args.step_batch_size_schedule:
        return blend.Length("--train-iters", args.train_iters, args.global_batch_size * args.seq_length)
    return None


def announce(args: Namespace, command: Command, notes: list[str], drawn: Sequence[blend.Draw] = ()) -> str:
    """The lines that a run starts with; ``drawn`` by :func:`data_draws`."""
    lines = [f"recipe   {_recipe(command.recipe)}"] if command.recipe else []
    lines += [f"layers   {args.hybrid_layer_pattern}", f"backend  {args.backend} on {args.device}"]
    lines += [f"kernels  {text}" for text in [_kernels(args)] if text]
    if args.device == "cpu":
        asked = "asked for" if command.device == "cpu" else "no CUDA device"
        lines.append(f"device   CPU engine ({asked}): Megatron's own training loop over gloo, no GPU")
    if drawn:
        lines += [f"{'' if i else 'data':9}{row}" for i, row in enumerate(blend.table(drawn))]
    lines += [f"note     {note}" for note in notes]
    lines += [f"warning  {warning}" for warning in command.pattern.warnings()]
    return "\n".join(lines)


def describe(args: Namespace, command: Command, found: dict[str, Any], drawn: Sequence[blend.Draw] = ()) -> str:
    """The resolved configuration: sizes, layout, data, and the flags that reach Megatron.

    found: by :func:`figures`; drawn: by :func:`data_draws`.
    """
    embedding, flops = found["parameters_embedding"], found["training_flops_per_token"]
    known = embedding is not None
    unknown = "without embeddings: the vocabulary is known with a tokenizer or --vocab-size"
    counts = {symbol: n for symbol, n in command.pattern.counts().items() if n}
    rows = {
        "recipe": _recipe(command.recipe) if command.recipe else "none",
        "pattern": args.hybrid_layer_pattern,
        "layers": ", ".join(f"{n} {LAYERS[s].name} ({s})" for s, n in counts.items()),
        **{
            name: text
            for layer in layers_of(args.hybrid_layer_pattern)
            for name, text in layer.account.describe(args).items()
        },
        "kernels": _kernels(args) or "no choice",
        "parameters": f"{found['parameters_total']:,} ({found['parameters_active']:,} active"
        + (f", {embedding:,} in embeddings)" if known else f"; {unknown})"),
        "training FLOPs per token": f"{flops:.3e}" if known else "not known without the vocabulary",
        "sequence length": f"{args.seq_length:,}",
        "global batch": f"{args.global_batch_size} samples, {args.global_batch_size * args.seq_length:,} tokens",
        "layout": f"{args.world_size} processes: tensor {args.tensor_model_parallel_size}, pipeline "
        f"{args.pipeline_model_parallel_size}, context {args.context_parallel_size}, expert "
        f"{args.expert_model_parallel_size}, data {args.data_parallel_size}",
        "backend": f"{args.backend} on {args.device}",
        "Mamba-2 kernels": args.ssm_kernels,
    }
    width = max(map(len, rows))
    table = "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
    if drawn:
        table += "\n\ndata\n  " + "\n  ".join(blend.table(drawn))
    return f"{table}\n\nflags\n  " + "\n  ".join(_pairs(command.argv))


def _kernels(args: Namespace) -> str:
    """Which kernel serves the attention of which symbol."""
    found = {layer.symbol: layer.account.kernels(args) for layer in layers_of(args.hybrid_layer_pattern)}
    return "; ".join(f"attention of {symbol}: {text}" for symbol, text in found.items() if text)


def _recipe(name: str) -> str:
    """The recipe that is run, which a preset may have chosen, and where its sizes come from."""
    return f"{name} ({recipes.recipe(name).source})"


def _pairs(argv: list[str]) -> list[str]:
    """Flags with their values, one flag a line."""
    lines: list[str] = []
    for arg in argv:
        if arg.startswith("--") or not lines:
            lines.append(arg)
        else:
            lines[-1] += f" {arg}"
    return lines
