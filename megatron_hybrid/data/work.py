"""The folder of a run that is not finished: its files, its lock, and its state on disk.

Everything is written into a hidden folder next to the output. ``state.json`` is replaced atomically, after the files
that it describes are on disk, so a killed run can always be resumed from it. At the end the files are renamed; that
step, too, can be repeated after a kill.
"""

import fcntl
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.files import atomic_write, sync_directory


class WorkFolder:
    """The unfinished files of a run; a second run on the same folder is refused while one is running."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is made yet."""
        self.path = path
        self._lock: BinaryIO | None = None

    @property
    def exists(self) -> bool:
        """Whether an earlier run left a state to resume from."""
        return (self.path / "state.json").exists()

    def open(self) -> dict[str, Any] | None:
        """Make and lock the folder; returns the state that an earlier run left, None if there is none.

        Raises ValueError if another process works in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"another process is writing the same output (it has locked {self.path}); wait for it, or stop it."
            ) from None
        except OSError:
            pass  # a file system without locks
        state = self.path / "state.json"
        if not state.is_file():
            return None
        try:
            return json.loads(state.read_text("utf-8"))
        except ValueError:
            self.close()
            raise ValueError(f"{state} is corrupt; delete {self.path} to start over.") from None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; the files that it describes have to be on disk."""
        with atomic_write(self.path / "state.json") as stream:
            stream.write(json.dumps(state).encode())

    def clear(self) -> None:
        """Delete the files of an earlier run, but for the lock."""
        (self.path / "state.json").unlink(missing_ok=True)  # first: there must be no state without its files
        for file in self.path.iterdir():
            if file.name != "lock":
                file.unlink()

    def publish(self, names: dict[str, str], stale: Sequence[str] = ()) -> None:
        """Rename the files to their final names, in this order, and delete the folder.

        names: the final name of each file of the folder. Those that are gone have their name already, from an
        earlier attempt. Old files of these names go first, last one first, so that old and new never stand together
        as a whole data set. stale: names of an earlier output that this one does not have; they are deleted.
        """
        parent = self.path.parent
        pending = [(self.path / name, parent / final) for name, final in names.items() if (self.path / name).exists()]
        if len(pending) == len(names):
            for final in [parent / name for name in stale] + [final for _, final in reversed(pending)]:
                final.unlink(missing_ok=True)
        for file, final in pending:
            file.replace(final)
        sync_directory(parent)
        self.delete()

    def delete(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
