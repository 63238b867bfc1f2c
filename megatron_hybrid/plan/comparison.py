"""Several architectures side by side, as they are or made comparable as the paper does."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_hybrid import costs, pattern, placement
from megatron_hybrid.argv import without
from megatron_hybrid.cli import recipes
from megatron_hybrid.cli.flags import load_layers
from megatron_hybrid.costs.match import match_flops, match_parameters
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan.figures import Figures, figures
from megatron_hybrid.plan.subject import Subject, Where, read
from megatron_hybrid.plan.time import Machine

Match = Literal["parameters", "flops"]


def subjects(words: Sequence[str], argv: Sequence[str], where: Where) -> list[Subject]:
    """One subject for each word: a recipe's name, or a layer pattern for the sizes of ``argv``.

    Args:
        argv: Flags that all have in common.

    Raises:
        ValueError: A word that is neither, or flags that a run would be refused for; with the word.
    """
    load_layers(list(argv))
    found = []
    for word in words:
        is_pattern = set(word) <= set("".join(LAYERS) + "|/()0123456789 ")
        flags = ["--hybrid-layer-pattern", word] if is_pattern else ["--recipe", word]
        if not is_pattern:
            recipes.recipe(word)
        try:
            made = read([*(argv if is_pattern else without(list(argv), "--recipe")), *flags], *where)
            found.append(replace(made, name=word) if is_pattern else made)
        except ValueError as error:
            raise ValueError(f"{word}: {error}") from error
    return found


def compare(
    found: Sequence[Subject],
    match: Match | None,
    convention: costs.Convention = "paper",
    where: Where = Where(),  # noqa: B008
    machine: Machine | None = None,
) -> Figures:
    """Figures of each subject, the first one being the reference of a match.

    ``parameters``: each architecture with the number of blocks whose active non-embedding parameters are nearest the
    reference's, on the reference's tokens. ``flops``: each architecture as it is, on as many tokens as the reference's
    training FLOPs pay for.

    Raises:
        ValueError: Nothing to compare, a reference without a length, or an architecture that is not made of blocks.
    """
    if len(found) < 2:
        raise ValueError("--compare takes two or more architectures; the first is the reference of --match.")
    reference, *others = found
    if match == "flops" and not reference.tokens:
        raise ValueError(f"--match needs the length of {reference.name}, its reference: give --train-iters.")
    rows = [_row(reference, reference.tokens, machine)]
    for other in others:
        tokens: float | None = other.tokens
        if match == "parameters":
            other, tokens = _matched(other, reference, where), reference.tokens
        elif match == "flops":
            assert reference.tokens
            budget = reference.tokens * costs.training_flops_per_token(reference.pattern, reference.sizes, convention)
            tokens = match_flops(budget, other.pattern, other.sizes, convention)
        rows.append(_row(other, tokens, machine))
    return {"match": match, "convention": convention, "architectures": rows}


def _row(subject: Subject, tokens: float | None, machine: Machine | None) -> Figures:
    """Figures of a subject that trains on this many tokens."""
    found = figures(subject, machine)
    if machine:
        found["time"]["days"] = tokens / found["time"]["tokens_per_day"] if tokens else None
    for flops in found["flops"].values():
        flops["run"] = flops["per_token"] * tokens if tokens else None
    batch = subject.args.global_batch_size * subject.args.seq_length
    return found | {"tokens": tokens, "iterations": round(tokens / batch) if tokens else None}


def _matched(subject: Subject, reference: Subject, where: Where) -> Subject:
    """The subject with as many blocks as come nearest the reference's parameters."""
    args = subject.args
    if not args.num_blocks:
        raise ValueError(
            f"{subject.name} is an explicit pattern, and --match parameters changes the number of blocks: give it as "
            "--num-blocks with --block-ratio, or as a recipe that does."
        )
    target = costs.model_parameters(reference.pattern, reference.sizes).active_non_embedding

    def of_blocks(number: int) -> pattern.Pattern:
        return placement.from_blocks(number, args.block_ratio, args.block_placement, args.block_mixers, args.ffn)

    blocks = match_parameters(target, of_blocks, subject.sizes)
    flags = subject.argv
    for flag in ("--hybrid-layer-pattern", "--num-blocks", "--recipe"):
        flags = without(flags, flag)
    return replace(read([*flags, "--num-blocks", str(blocks)], *where), name=subject.name)
