"""Whether flags and allocation fit, before anything starts."""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.argv import value
from megatron_hybrid.cli import flags
from megatron_hybrid.launch.allocation import Allocation


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of ranks."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    world: int

    @property
    def data(self) -> int:
        """Copies of the model."""
        return self.world // (self.tensor * self.pipeline * self.context)

    def __str__(self) -> str:
        return (
            f"{self.world} ranks: tensor {self.tensor}, pipeline {self.pipeline}, context {self.context}, "
            f"expert {self.expert}, data {self.data}"
        )


@dataclass(frozen=True)
class Plan:
    """A job that may start."""

    command: flags.Command
    argv: list[str]
    """For the ranks: the user's flags, and those that the launcher adds."""
    layout: Layout
    save: Path
    notes: list[str]


def check(argv: list[str], allocation: Allocation) -> Plan:
    """Checks flags against the allocation, as Megatron would on every rank after minutes of starting.

    Raises:
        ValueError: One of Megatron's or our rules is broken; the text says what to change.
    """
    command = flags.resolve(argv)
    save = _save(command.argv)
    _once_only(command.argv, save)
    layout = _layout(command, allocation.world)
    added = ["--exit-signal-handler"] if "--exit-signal-handler" not in command.argv else []
    if not value(command.argv, "--load"):
        added += ["--load", str(save)]
    return Plan(command, [*argv, *added], layout, save, _placement(layout, allocation))


def _save(argv: list[str]) -> Path:
    folder = value(argv, "--save")
    if not folder:
        raise ValueError("--save is not given: the run's folder has its checkpoints, logs and state; give one.")
    save = Path(folder)
    if not save.is_dir() and not save.absolute().parent.is_dir():
        raise ValueError(
            f"--save {save}: {save.absolute().parent} does not exist. Make it, if the file system of the runs is "
            "mounted here; only the run's own folder is created."
        )
    return save


def _once_only(argv: list[str], save: Path) -> None:
    """Refuses flags that are meant for one start and would be repeated by each."""
    load = value(argv, "--load") or str(save)
    if os.path.realpath(load) != os.path.realpath(save):
        return  # then it is for the first start: the others resume from the run's own checkpoints
    given = {word.partition("=")[0] for word in argv}
    for flag in ("--ckpt-step", "--finetune", "--no-load-optim", "--no-load-rng"):
        if flag in given and flag.replace("load", "save") not in given - {"--ckpt-step", "--finetune"}:
            raise ValueError(
                f"{flag}, and the run loads from its own folder {save}: each restart of the job would repeat that, and "
                "lose the progress since. Give --load another folder; or, to go back to an iteration, write it "
                "into latest_checkpointed_iteration.txt."
            )


def _layout(command: flags.Command, world: int) -> Layout:
    def size(flag: str, default: int = 1) -> int:
        given = value(command.argv, flag, str(default))
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"{flag} is {given}; it is a number of ranks, at least 1.")
        return int(given)

    tensor, context = size("--tensor-model-parallel-size"), size("--context-parallel-size")
    pipeline = size("--pipeline-model-parallel-size")
    if pipeline == 1 and command.balance is not None:
        pipeline = command.balance  # as cli/arguments.balance takes it
    expert, expert_tensor = size("--expert-model-parallel-size"), size("--expert-tensor-parallel-size", tensor)
    layout = Layout(tensor, pipeline, context, expert, expert_tensor, world)
    for name, needed in (
        (f"tensor {tensor} x pipeline {pipeline} x context {context}", tensor * pipeline * context),
        (f"expert {expert} x expert-tensor {expert_tensor} x pipeline {pipeline}", expert * expert_tensor * pipeline),
    ):
        if world % needed:
            raise ValueError(
                f"The job has {world} ranks, and {name} needs a multiple of {needed}: change the number of nodes or of "
                "processes on each, or the layout."
            )
    return layout


def _placement(layout: Layout, allocation: Allocation) -> list[str]:
    """Notes on groups that cross nodes. Raises ValueError for tensor-parallel groups that do."""
    processes, notes = allocation.processes, []
    if len(allocation.nodes) > 1 and processes % layout.tensor:
        raise ValueError(
            f"--tensor-model-parallel-size is {layout.tensor}, and a node runs {processes} ranks: a tensor-parallel "
            f"group would cross nodes, where each layer waits for the network. Choose a size that divides {processes}, "
            "and pipeline stages for the rest."
        )
    if len(allocation.nodes) > 1 and processes % (layout.tensor * layout.context):
        notes.append(
            f"context-parallel groups cross nodes: tensor {layout.tensor} x context {layout.context} does not divide "
            f"the {processes} ranks of a node"
        )
    return notes
