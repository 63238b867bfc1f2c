"""Starts a rank with its output in its log. Run by path, with the standard library only.

python rank.py LOGS PROGRAM FLAGS becomes `python PROGRAM FLAGS` with rank_RANK.log for both streams.
"""

import contextlib
import os
import signal
import sys
import time


def main(logs: str, command: list[str]) -> None:
    """Replaces this process by the program; the environment is torchrun's."""
    # SLURM's --signal without B: also reaches ranks, which it would end; their agent forwards it as SIGTERM
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    path = os.path.join(logs, f"rank_{int(os.environ['RANK']):03}.log")
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    if os.fstat(log).st_size:
        now, restart = time.strftime("%Y-%m-%d %H:%M:%S"), os.environ["TORCHELASTIC_RESTART_COUNT"]
        with contextlib.suppress(OSError):  # a full disk
            os.write(log, f"\n---- restarted at {now} (restart {restart})\n".encode())
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execv(sys.executable, [sys.executable, "-u", *command])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
