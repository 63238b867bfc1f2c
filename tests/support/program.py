"""The program itself in the ranks: a whole run by its command line, and Megatron as it was when it ends."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from tests.support.training import forget


def train(argv: list[str], out: io.StringIO | None = None) -> str:
    """Runs pretrain_hybrid.py in this rank; what it printed, which also goes to ``out``. It may raise SystemExit."""
    import pretrain_hybrid

    forget()
    out = out or io.StringIO()
    with hooks_removed_after(), contextlib.redirect_stdout(out):
        pretrain_hybrid.main(argv)
    return out.getvalue()


def end(argv: list[str]) -> tuple[str, Any]:
    """The same, with errors in what it printed, and the code of the exit that it ended by; None if it came to its end.

    Raises:
        AssertionError: It refused its flags, with what it said.
    """
    out, code = io.StringIO(), None
    with contextlib.redirect_stderr(out):
        try:
            train(argv, out)
        except SystemExit as error:
            code = error.code
    assert code != 2, f"the program refused its flags: {out.getvalue()}"
    return out.getvalue(), code


@contextlib.contextmanager
def hooks_removed_after() -> Iterator[None]:
    """Puts back the names of Megatron's modules that a run has replaced: the next one in this process hooks its own."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import async_utils, checkpointing, training

    modules = (training, checkpointing, serialization)
    kept, words = [dict(vars(module)) for module in modules], sys.argv
    async_utils._async_calls_queue = None  # a process makes it once, by its own flags
    try:
        yield
    finally:
        filesystem_async._results_queue = None  # a run ends its helpers, the queue's process among them
        sys.argv = words
        for module, names in zip(modules, kept, strict=True):
            for name, thing in names.items():
                if callable(thing) and vars(module)[name] is not thing:
                    setattr(module, name, thing)
