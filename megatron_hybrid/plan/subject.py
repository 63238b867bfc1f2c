"""What a plan is about: a command line, checked as the run itself would check it."""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_hybrid import pattern
from megatron_hybrid.accounting.activation_settings import DEFAULT_SSM_KERNELS, SSM_KERNELS
from megatron_hybrid.accounting.eight_bit import SCALES
from megatron_hybrid.argv import value, without
from megatron_hybrid.cli import flags, fp8_checks
from megatron_hybrid.costs import Layout, Sizes, equal_count, sizes_of
from megatron_hybrid.patches import light_import
from megatron_hybrid.pattern import Pattern


@dataclass(frozen=True)
class Subject:
    """A run that is planned."""

    name: str
    """Its recipe, or its pattern."""
    argv: list[str]
    """Resolved flags; :func:`read` takes them again."""
    args: Namespace
    """Megatron's validated arguments and ours."""
    pattern: Pattern
    """With the boundaries of its pipeline stages, also where the flags leave them to Megatron."""
    sizes: Sizes
    layout: Layout

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run; None where the flags do not say."""
        args = self.args
        samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
        return samples * args.seq_length or None


class Where(NamedTuple):
    """What :func:`read` takes beside a command line."""

    gpus: int | None = None
    device: str = "cuda"
    memory: float | None = None


def read(argv: Sequence[str], gpus: int | None = None, device: str = "cuda", memory: float | None = None) -> Subject:
    """Reads a command line of ``pretrain_hybrid.py`` for a machine that need not be here.

    Data and tokenizer need not be given, nor a GPU be there. Without a GPU the CPU engine stands in for one while
    Megatron checks its flags.

    Args:
        argv: Flags, those of a recipe among them.
        gpus: Ranks; default the fewest that the layout fits.
        device: Where the run would be: ``cuda`` or ``cpu``.
        memory: Bytes of a GPU, by which a recipe's micro-batch is chosen as the run does; None: it stays as it is.

    Raises:
        ValueError: What the run itself would be refused for, or no vocabulary size.
    """
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus {gpus}: give at least 1.")
    words: list[str] = list(argv)
    names_alone: list[str] = []
    kernels = value(words, "--ssm-kernels", "auto")
    assumed: dict[str, Any] = {}
    if value(words, "--backend") == "te":  # a run needs Transformer Engine for it; costs need to know of it alone
        if value(words, "--fp4-format"):  # else refused for want of the backend that was just given
            raise ValueError("--fp4-format: memory and time of 4-bit products are not counted. Drop it.")
        words, names_alone, assumed = _without_te(words)
    if device == "cuda":
        if kernels in (*SSM_KERNELS, "auto"):  # likewise
            words = without(words, "--ssm-kernels")
            kernels = DEFAULT_SSM_KERNELS[device] if kernels == "auto" else kernels
            names_alone += ["--ssm-kernels", kernels]
        assumed["ssm_kernels"] = kernels
    command, args = _checked(flags.resolve(words), gpus, device, memory, assumed)
    vars(args).update(assumed)
    if args.fp8:
        fp8_checks.check(args)
    layers, layout = pattern.parse(args.hybrid_layer_pattern), Layout.from_args(args)
    if layout.pp > len(layers.segments):
        layers = equal_count(layers, layout.pp)
    return Subject(
        name=command.recipe or args.hybrid_layer_pattern,
        argv=[*command.argv, *names_alone],
        args=args,
        pattern=layers,
        sizes=sizes_of(args),
        layout=layout,
    )


def _without_te(words: list[str]) -> tuple[list[str], list[str], dict[str, Any]]:
    """The flags without those that need Transformer Engine; these alone; and what they set."""
    flags, assumed = ["--backend", "te"], {"backend": "te"}
    words = without(words, "--backend")
    form, recipe = value(words, "--fp8-format"), value(words, "--fp8-recipe", "delayed")
    if not form:
        return words, flags, assumed
    for flag, given, known in (("--fp8-format", form, ("e4m3", "hybrid")), ("--fp8-recipe", recipe, tuple(SCALES))):
        if given not in known:
            raise ValueError(f"{flag} {given} is not counted: counted are {', '.join(known)}.")
        words, flags = without(words, flag), [*flags, flag, given]
    return words, flags, {**assumed, "fp8": form, "fp8_recipe": recipe}


def _checked(
    command: flags.Command, gpus: int | None, device: str, memory: float | None, assumed: dict[str, Any]
) -> tuple[flags.Command, Namespace]:
    """The command with its layers cut and its micro-batch chosen, and its arguments, as Megatron and the costs take
    them."""
    light_import.postpone("wandb")
    with light_import.no_collection():
        from megatron_hybrid.cli import arguments, micro_batch_size

        arguments.choose_device("auto")
        with light_import.plain_functions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself has Megatron's; a search would repeat them
            command = arguments.balance(command, device, launched=False)
            args = arguments.parse(command.argv, device, print_config=True, world=gpus, launched=False)
            if memory is not None and command.micro_batch_is_free:
                command = micro_batch_size.for_memory(command, args, memory, assumed)
                args = arguments.parse(command.argv, device, print_config=True, world=gpus, launched=False)
    if not (args.padded_vocab_size or args.vocab_size):
        raise ValueError(
            "The plan needs --vocab-size, or a --tokenizer-model that is here: embedding and output head depend on it. "
            "A rounded number will do."
        )
    if args.moe_expert_capacity_factor is not None:
        raise ValueError(
            f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor}: costs are those of experts that take all "
            "their tokens. Drop it from the plan."
        )
    return command, args
