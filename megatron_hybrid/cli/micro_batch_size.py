"""A recipe's micro-batch on a GPU: the largest whose planned memory fits, unless the user gives one.

Larger micro-batches make larger matrix products and fewer launches. Recipes state 1, which fits everywhere; on the CPU
engine they keep what they state.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid import costs, pattern
from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.argv import without
from megatron_hybrid.cli.flags import Command
from megatron_hybrid.costs.activations import stage_activation_bytes
from megatron_hybrid.costs.hardware import MICRO_BATCHES, RESERVE, gpu_of_device
from megatron_hybrid.costs.memory import rank_memory
from megatron_hybrid.run_folder.checkpoints import checkpoints
from megatron_hybrid.run_folder.run_info import read_run_info

FLAG = "--micro-batch-size"
PER_STAGE = 4
"""With pipeline stages: micro-batches of a step that are left to each stage, lest the pipeline's bubble grow."""


class Choice(NamedTuple):
    """A micro-batch and what to say of it."""

    size: int
    note: str


def for_this_device(command: Command, device: str) -> Command:
    """The command with its micro-batch chosen for this machine's GPUs; all ranks of a run choose the same.

    Rank 0 decides for the rank that has the least memory. A run that goes on from its own checkpoints keeps the
    micro-batch that it had, if that still fits.

    Raises:
        ValueError: Flags that the run would be refused for.
        Unreachable: A rank does not answer.
    """
    if not command.micro_batch_is_free or device != "cuda":
        return command
    from megatron_hybrid.checkpoint import agreement
    from megatron_hybrid.cli import arguments

    world = None if command.print_config else int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments.parse(command.argv, device, print_config=True, world=world)

    def decide(ask: Any) -> dict[str, Any]:
        memory = min(float(text) for text in ask(Path()))
        return _kept(args, memory) or largest(args, memory)._asdict()

    found = agreement.among_ranks(
        args,
        decide,
        lambda folder, part, parts: [str(_memory(args.local_rank))],
        "the micro-batch",
        bytes_of=lambda folder: 0,
        alone=command.print_config,
    )
    return _with(command, Choice(**found))


def for_memory(command: Command, args: Namespace, memory: float, assumed: Mapping[str, Any]) -> Command:
    """The command with the micro-batch that a run chooses on GPUs of this memory.

    Args:
        args: Megatron's arguments of the command, validated.
        memory: Bytes of a GPU.
        assumed: Attributes of ``args`` that are otherwise on the machine of the run: ``backend``, ``ssm_kernels``.
    """
    if not command.micro_batch_is_free or args.device != "cuda":
        return command
    return _with(command, largest(Namespace(**{**vars(args), **assumed}), memory))


def largest(args: Namespace, memory: float) -> Choice:
    """The largest of the planner's micro-batches that divides the batch and whose memory fits.

    Args:
        args: Megatron's, validated, with the recipe's micro-batch.
        memory: Bytes of a GPU, of which the planner's reserve stays free.
    """
    recipe = args.micro_batch_size
    if args.step_batch_size_schedule or args.decrease_batch_size_if_needed:
        return Choice(recipe, f"micro-batch {recipe}: the recipe's, since the batch changes during the run")
    for size in sorted({*MICRO_BATCHES, recipe}, reverse=True):
        if not _divides(args, size):
            continue
        try:
            need = needed(args, size)
        except ValueError as error:
            return Choice(recipe, f"micro-batch {recipe}: the recipe's, since its memory is not known ({error})")
        if need <= (1 - RESERVE) * memory:
            planned = f"{need / 2**30:.1f} of {memory / 2**30:.1f} GiB planned"
            return Choice(size, f"micro-batch {size}: the largest that fits, with {planned} ({FLAG} sets another)")
    return Choice(
        recipe, f"micro-batch {recipe}: the recipe's, although the plan does not fit {memory / 2**30:.1f} GiB"
    )


def needed(args: Namespace, micro_batch: int) -> float:
    """Planned bytes of the fullest rank.

    Raises:
        ValueError: Something in the flags is not counted, or the vocabulary is not known.
    """
    if not (args.padded_vocab_size or args.vocab_size):
        raise ValueError("the vocabulary is known with --vocab-size alone")
    args = Namespace(**{**vars(args), "micro_batch_size": micro_batch})
    layers, layout, sizes = pattern.parse(args.hybrid_layer_pattern), costs.Layout.from_args(args), costs.sizes_of(args)
    if layout.pp > len(layers.segments):
        layers = costs.equal_count(layers, layout.pp)
    storage, settings = Storage.from_args(args), ActivationSettings.from_args(args)
    return max(
        rank_memory(layers, sizes, layout, storage, stage).total
        + stage_activation_bytes(layers, sizes, layout, settings, stage)
        for stage in range(layout.pp)
    )


def _divides(args: Namespace, size: int) -> bool:
    """Whether the batch divides into micro-batches of this size, and enough of them for the pipeline's stages."""
    from megatron_hybrid.cli.checks import check_batch

    try:
        check_batch(Namespace(**{**vars(args), "micro_batch_size": size}))
    except ValueError:
        return False
    stages = args.pipeline_model_parallel_size
    count = args.global_batch_size // (size * args.data_parallel_size)
    return stages == 1 or size <= args.micro_batch_size or count >= PER_STAGE * stages


def _kept(args: Namespace, memory: float) -> dict[str, Any] | None:
    """The micro-batch of the run so far, where it still divides and fits; None if there is none."""
    if not args.save or not checkpoints(Path(args.save)):
        return None
    size = read_run_info(Path(args.save)).get("args", {}).get("micro_batch_size")
    if not isinstance(size, int) or size < 1 or not _divides(args, size):
        return None
    try:
        if needed(args, size) > (1 - RESERVE) * memory:
            return None
    except ValueError:
        pass  # not counted: what has run is taken to fit
    return Choice(size, f"micro-batch {size}: as in this run so far ({FLAG} sets another)")._asdict()


def _memory(device: int) -> float:
    """Bytes of a GPU, equal for all GPUs of a kind whatever their driver says."""
    import torch

    known = gpu_of_device(torch.cuda.get_device_name(device))
    there = torch.cuda.get_device_properties(device).total_memory
    return known.capacity if known and known.capacity < 1.02 * there else there // 2**30 * 2**30


def _with(command: Command, choice: Choice) -> Command:
    argv = [*without(command.argv, FLAG), FLAG, str(choice.size)]
    return replace(command, argv=argv, micro_batch_is_free=False, notes=(*command.notes, choice.note))
