"""Training started from another program on this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def run_ranks(command: list[str], processes: int, log: Path, look: Callable[[], None] = lambda: None) -> int:
    """Runs torchrun to its end, with its output in a log file; where this program is ended, so are all ranks.

    Args:
        command: torchrun, the program and its flags.
        processes: Ranks, which share the cores.
        log: Overwritten.
        look: Called twice a second.

    Returns:
        The exit code.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C reaches this program alone, which then ends all ranks.
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | threads, start_new_session=True
        )
        try:
            while process.poll() is None:
                look()
                time.sleep(0.5)
        except BaseException:
            _end(process)
            raise
    return process.returncode


def _end(process: subprocess.Popen) -> None:
    """End a command and all processes of its session: politely, then at once.

    torchrun's ranks have sessions of their own; it ends them itself, within 30 s.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=40)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
