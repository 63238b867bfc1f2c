"""Stands in front of a process, which then ends when the process that started it ends. Run by path; standard library.

python die_with_parent.py STARTER_PID PROGRAM ARGUMENTS becomes `PROGRAM ARGUMENTS`.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(starter: int, command: list[str]) -> None:
    """Replaces this process by the command; the kernel's promise outlives that."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
