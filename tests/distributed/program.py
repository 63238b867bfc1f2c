"""The program itself in the ranks: a whole run by its command line, and Megatron as it was when it ends."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from tests.distributed.training import forget


def train(argv: list[str]) -> str:
    """Runs pretrain_hybrid.py in this rank; what it printed."""
    return end(argv)[0]


def end(argv: list[str]) -> tuple[str, Any]:
    """The same, with the code of the exit that the run ended by; None if it ran to its end."""
    import pretrain_hybrid

    forget()
    out, code = io.StringIO(), None
    with hooks_removed_after(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            pretrain_hybrid.main(argv)
        except SystemExit as error:
            code = error.code
            if code == 2:
                raise AssertionError(f"the program refused its flags: {out.getvalue()}") from None
    return out.getvalue(), code


@contextlib.contextmanager
def hooks_removed_after() -> Iterator[None]:
    """Puts back the names of Megatron's modules that a run has replaced: the next one in this process hooks its own."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.training import async_utils, checkpointing, training

    modules = (training, checkpointing, serialization)
    kept, words = [dict(vars(module)) for module in modules], sys.argv
    async_utils._async_calls_queue = None  # a process makes it once, by its own flags
    try:
        yield
    finally:
        sys.argv = words
        for module, names in zip(modules, kept, strict=True):
            for name, thing in names.items():
                if callable(thing) and vars(module)[name] is not thing:
                    setattr(module, name, thing)
