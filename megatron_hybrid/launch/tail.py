"""Shows what is appended to a file, as `tail -f` does."""

import os
import threading
from pathlib import Path

INTERVAL_S = 0.2


class Tail:
    """Copies what is written to ``path`` from now on to standard output, in complete lines, until stop()."""

    def __init__(self, path: Path):
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0
        self._left = b""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Shows the rest and stops."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._copy()
        self._copy()
        if self._left:
            _write(self._left + b"\n")

    def _copy(self) -> None:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._at)
                new = stream.read()
        except OSError:
            return
        self._at += len(new)
        lines, newline, self._left = (self._left + new).rpartition(b"\n")
        if newline:
            _write(lines + newline)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]
