"""The hooks of a run in Megatron's training loop, checkpoints and evaluation: who wraps what, from the innermost out.

The callables come from ``training/`` and ``checkpoint/``; the order is that of :data:`HOOKS`, whatever the order in
which they are given.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_hybrid.patches import patching
from megatron_hybrid.patches.patching import Patch, Table

Wrapper = Callable[[Callable], Callable]
"""A function of Megatron's to the one that takes its place."""
TRAINING = "megatron.training.training"
CHECKPOINTING = "megatron.training.checkpointing"
SERIALIZATION = "megatron.core.dist_checkpointing.serialization"
NAME = "hooks of the run"


class Hook(NamedTuple):
    """A function of Megatron's that a run wraps or replaces."""

    owner: str
    function: str
    hook: str
    """Name of the callable that takes its place."""
    reason: str
    upstream: str


HOOKS = (
    Hook(
        TRAINING,
        "num_floating_point_operations",
        "count_flops",
        "upstream counts layers of ours as nothing",
        "training/training.py:390",
    ),
    # A batch that is skipped is drawn inside of what stops the clock for it
    Hook(
        TRAINING,
        "dummy_train_step",
        "draw_skipped_batch",
        "upstream broadcasts a skipped batch with an attention mask that there is not, and draws on every stage",
        "training/training.py:2289",
    ),
    Hook(TRAINING, "dummy_train_step", "stop_clock", "it is no step", "training/training.py:2289"),
    Hook(TRAINING, "save_checkpoint_and_time", "stop_clock", "it is no step", "training/training.py:3030"),
    Hook(TRAINING, "train", "keep_model", "what is measured is of the model", "training/training.py:3342"),
    Hook(TRAINING, "training_log", "record_step", "called with each step's values", "training/training.py:2568"),
    Hook(TRAINING, "train_step", "watch_step", "a bad step must make no update", "training/training.py:2336"),
    Hook(TRAINING, "train_step", "measure_step", "a benchmark times and profiles it", "training/training.py:2336"),
    # Whole sets are given to what records a validation: set by set where several are evaluated apart
    Hook(
        TRAINING,
        "evaluate_and_print_results",
        "record_validation",
        "called once for each validation",
        "training/training.py:4342",
    ),
    Hook(
        TRAINING,
        "evaluate_and_print_results",
        "validate_whole_sets",
        "it needs the number of steps of each set",
        "training/training.py:4342",
    ),
    # A save: retention is scheduled where upstream schedules the save; the seal is before the pointer
    Hook(
        SERIALIZATION,
        "save_integrity_manifest",
        "seal",
        "the same manifest, hashed on threads and brought to disk before the pointer",
        "core/dist_checkpointing/serialization.py:457",
    ),
    Hook(
        CHECKPOINTING,
        "schedule_async_save",
        "remove_old_checkpoints",
        "retention is behind the save in the background",
        "training/checkpointing.py:1121",
    ),
    Hook(
        TRAINING,
        "maybe_finalize_async_save",
        "explain_failure",
        "a failed save in the background is explained",
        "training/training.py:4120",
    ),
    Hook(
        TRAINING,
        "save_checkpoint",
        "guard_save",
        "clears the folder before a save, explains a failure, removes old ones after it",
        "training/training.py:3086",
    ),
    Hook(
        SERIALIZATION,
        "verify_integrity_manifest",
        "verify_others",
        "the checkpoint to load is verified already, by all ranks and on threads",
        "core/dist_checkpointing/serialization.py:122",
    ),
)


def install_hooks(given: Mapping[str, Wrapper]) -> None:
    """Installs the hooks of a run, which :func:`.patching.uninstall_run` takes back.

    Args:
        given: Names in :data:`HOOKS` to the callables that take a function of Megatron's and return its replacement.
            Hooks that are not given are left out.

    Raises:
        ValueError: A name that is in no row.
        RuntimeError: Another run's hooks are installed; or the process is not prepared.
    """
    unknown = sorted(set(given) - {hook.hook for hook in HOOKS})
    if unknown:
        raise ValueError(
            f"no hook is called {', '.join(unknown)}: known are {', '.join(sorted({h.hook for h in HOOKS}))}"
        )
    rows = tuple(
        Patch(hook.owner, hook.function, given[hook.hook], hook.reason, hook.upstream, contract=hook.hook)
        for hook in HOOKS
        if hook.hook in given
    )
    patching.install(Table(NAME, rows, after=("building",), of_run=True))


def wrap_evaluate(wrapper: Wrapper) -> Any:
    """Context manager: training/training.py's ``evaluate`` is wrapped during one validation."""
    return patching.replaced(TRAINING, "evaluate", wrapper)


def wrap_update(optimizer: Any, norm: Wrapper, update: Wrapper) -> None:
    """Wraps what a run's optimizer calls in each step, as long as it lives.

    Args:
        optimizer: Upstream's chained one.
        norm: For ``get_grad_norm``.
        update: For ``step_with_ready_grads``, which is called when the norm is known.
    """
    optimizer.get_grad_norm = norm(optimizer.get_grad_norm)
    optimizer.step_with_ready_grads = update(optimizer.step_with_ready_grads)


def wrap_restore(machine: Any, restore: Wrapper) -> None:
    """Wraps what the rerun machine of a run calls before it does a step again."""
    machine.state_restore_func = restore(machine.state_restore_func)
