"""What ranks run: the checks of a run's data, which come before its model."""

from typing import Any

from tests.support import program
from tests.support.training import SIZES, STEPS, forget


def words(flags: str) -> list[str]:
    """The command line of a small run with the flags that name its data."""
    return f"{SIZES} {STEPS.replace('--mock-data', '')} --eval-iters 0 {flags} --hybrid-layer-pattern M-".split()


def checked(flags: str) -> dict[str, Any]:
    """The checks of a command line on this rank: an error, or notes, the model's rows and what the ranks agreed on."""
    from megatron_hybrid.checkpoint import resume
    from megatron_hybrid.checkpoint.stored_settings import stored_arguments
    from megatron_hybrid.cli import arguments
    from megatron_hybrid.cli import flags as command_line
    from megatron_hybrid.training import data_checks

    forget()
    try:
        args = arguments.parse(command_line.resolve(words(flags)).argv, "cpu")
        resume.choose_checkpoint(args)
        stored = stored_arguments(args.checkpoint) if args.checkpoint else None
        notes = data_checks.check_data_content(args, stored)
    except ValueError as error:
        return {"error": str(error)}
    rows = args.padded_vocab_size
    return {"notes": notes, "contents": args.data_contents, "cache": args.data_cache_path, "rows": rows}


def trained(flags: str) -> str:
    """A run of one step, by the program itself; what it printed."""
    return program.train(words(f"{flags} --train-iters 1 --eval-interval 9 --device cpu --num-workers 0"))


def train_set(flags: str) -> dict[str, Any]:
    """After the same checks: how many documents the order has that this rank draws by; None where it draws nothing."""
    from megatron.training.initialize import initialize_megatron

    from megatron_hybrid.training.provider import datasets

    found = checked(flags)
    initialize_megatron()
    data = datasets([80, 0, 0])[0]
    return {**found, "documents": None if data is None else len(set(data.document_index.tolist()))}
