"""How a run ends: Megatron exits with code 0 whether it is finished or not, so state.json says which."""

import multiprocessing
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hybrid.run_folder.state import State, Status, write_state


@contextmanager
def state_of_the_run(run: Path | None, args: Namespace) -> Iterator[None]:
    """Keeps state.json of a run while its body trains; rank 0 writes.

    A rank that dies leaves ``running``: nobody could say more. Upstream leaves the training loop through
    ``sys.exit`` (training/training.py:4155), with code 0 after a signal, an interval or a duration, and with those
    of core/rerun_state_machine.py:37 when a result was rejected.

    Args:
        run: The folder; None writes nothing.
        args: Megatron's global arguments: the loop counts ``curr_iteration`` in them.
    """

    def say(status: Status, reason: str = "", iteration: int | None = None) -> None:
        if run is not None and args.rank == 0:
            try:
                write_state(run, State(status=status, reason=reason, iteration=iteration, train_iters=args.train_iters))
            except OSError as error:  # a full disk: the run may still make room by its next save, or be told to
                print(f"WARNING: state.json of {run} does not say {status}: {error}", file=sys.stderr, flush=True)

    say("running")
    try:
        yield
    except SystemExit as end:
        begun = getattr(args, "curr_iteration", None)  # counts from 0; None before the training loop
        if begun is not None and end.code in result_validation_codes():
            say("failed", "result validation", begun)
        elif begun is not None and not end.code:
            say("stopped", "signal" if signal_received(args) else "flag", begun + 1)
        raise
    else:
        say("finished", iteration=args.iteration if args.skip_train else args.train_iters)
    finally:
        end_helpers()


def end_helpers() -> None:
    """Kills the processes that this one has started, before it ends; all that they had to do is done or given up.

    Python would wait for them for ever, and the other ranks with it: it sends them SIGTERM, which workers of data
    loaders ignore (training/datasets/data_samplers.py:94) and which is blocked in the worker of background saves
    (:func:`megatron_hybrid.patches.child_processes.block_sigterm_in_children`). Upstream closes that one only after a
    save (core/dist_checkpointing/strategies/async_utils.py, ``AsyncCallsQueue.close``), and waits for ever for a dead
    one.
    """
    upstream = sys.modules.get("megatron.core.dist_checkpointing.strategies.async_utils")
    if upstream and upstream.AsyncCallsQueue._persistent_caller:
        upstream.AsyncCallsQueue._persistent_caller.close(abort=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error of its own for each of them
    for process in multiprocessing.active_children():
        process.kill()


def result_validation_codes() -> tuple[int, int]:
    """Exit codes that ask for a rerun elsewhere, and that say it has failed (core/rerun_state_machine.py:37)."""
    from megatron.core import rerun_state_machine

    return (
        rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE,
        rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    )


def signal_received(args: Namespace) -> bool:
    """Whether any rank got the exit signal; every rank takes part (training/dist_signal_handler.py:54)."""
    from megatron.training.global_vars import get_signal_handler

    return bool(args.exit_signal_handler) and any(get_signal_handler().signals_received())
