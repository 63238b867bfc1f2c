"""The program itself in the ranks: a whole run by its command line, and Megatron as it was when it ends."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from tests.support.training import SIZES, STEPS, forget


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
    """Takes back what a run has hooked into Megatron: the next one in this process hooks its own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import async_utils

    from megatron_hybrid.patches.patching import uninstall_run

    words = sys.argv
    async_utils._async_calls_queue = None  # a process makes it once, by its own flags
    try:
        yield
    finally:
        filesystem_async._results_queue = None  # a run ends its helpers, the queue's process among them
        sys.argv = words
        uninstall_run()


def program(line: str, sizes: bool = True, mock: bool = True) -> tuple[int, str, str]:
    """Runs the program's main() in this rank, with flags that end it before the training.

    Args:
        line: The flags.
        sizes: Behind those of tests/support/training.py.
        mock: With ``--mock-data``, when behind those.

    Returns:
        Exit code, output and errors.
    """
    import pretrain_hybrid

    forget()
    pretrain_hybrid.PATIENCE_S = 0.0
    before = f"{SIZES} {STEPS}" if mock else f"{SIZES} {STEPS}".replace("--mock-data", "")
    argv, kept = f"{before if sizes else ''} {line}".split(), sys.argv
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            pretrain_hybrid.main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = kept
    return code, out.getvalue(), errors.getvalue()


def is_one_paragraph(code: int, out: str, errors: str) -> bool:
    """Whether a program has refused its flags as it should: what :func:`program` gives."""
    out = "" if "Megatron refuses" in errors else out  # upstream prints its layout before it checks
    return code == 2 and not out and errors.startswith("error: ") and "\n\n" not in errors and len(errors) < 900
