"""integrity.json, the manifest of a checkpoint: SHA-256 of its files, in upstream's format, hashed on threads.

A hash detects what is incomplete or corrupt, not who wrote it: load checkpoints only from trusted folders. The patches
decide which classes may be unpickled.
"""

import errno
import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_hybrid.files import atomic_write

MANIFEST = "integrity.json"
ALGORITHM = "sha256"
MOST_THREADS = 16
PASSING = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.ENOMEM} | {
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENETDOWN),
    *(errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE),
}
"""Errors of a file system that may be gone at the next attempt: they say nothing about a checkpoint's content."""


class Unreachable(OSError):
    """Something that a run needs does not respond at the moment: files on a network, or other ranks."""


def passing(error: OSError) -> bool:
    """Whether another attempt may succeed."""
    return isinstance(error, Unreachable) or error.errno in PASSING


def problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint; empty if it is sealed and valid.

    Opens files as bytes only. A listed file may be a symbolic link as long as it stays inside the folder, since
    the manifest only describes the folder's content. Files that begin with a dot, other than ``.metadata``, and folders
    need not be listed: nothing loads them.

    Args:
        folder: The checkpoint's own folder.
        part: Which share of the files to hash, from 0. The manifest itself is checked in every share.
        parts: Number of shares, which together hash each file once.

    Raises:
        Unreachable: A file cannot be read at the moment. Skipping the checkpoint for that would lose steps.
    """
    if not folder.is_dir():
        return ["is not a folder" if folder.exists() else "is not there"]
    try:
        listed = _read(folder)
    except FileNotFoundError:
        return [f"has no manifest ({MANIFEST}): it is unfinished, or was written elsewhere"]
    except (ValueError, RecursionError) as error:
        return [f"{MANIFEST} is not a manifest: {error}"]
    except OSError as error:
        return [f"{MANIFEST} is not a manifest: {_lasting(error, folder / MANIFEST)}"]
    try:
        extra = sorted(_to_list(folder) - set(listed))
    except OSError as error:
        return [f"cannot be read: {_lasting(error, folder)}"]
    wrong = [f"{MANIFEST} does not list {name}" for name in [*_lacking(set(listed)), *extra]]
    share = sorted(listed)[part::parts]
    with ThreadPoolExecutor(_threads(len(share))) as pool:
        wrong += [text for text in pool.map(lambda name: _differs(folder, name, listed[name]), share) if text]
    return wrong


def seal(folder: Path) -> None:
    """Hashes a finished checkpoint, flushes its files to disk and writes its manifest.

    Raises:
        ValueError: It lacks files that every checkpoint of the format torch_dist has.
        OSError: A file cannot be read, or the manifest cannot be written; there is none then.
    """
    names = sorted(_to_list(folder))
    lacking = _lacking(set(names))
    if lacking:
        raise ValueError(
            f"{folder} is not a complete checkpoint of the format torch_dist: it has no {', no '.join(lacking)}. Seal "
            "the folder of one iteration (iter_...) of a finished save."
        )
    with ThreadPoolExecutor(_threads(len(names))) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, sync=True), names))
    with atomic_write(folder / MANIFEST) as stream:
        text = json.dumps({"algorithm": ALGORITHM, "files": dict(zip(names, digests, strict=True))}, indent=2)
        stream.write(text.encode())


def is_sealed(folder: Path) -> bool:
    """Whether there is a manifest, valid or not."""
    return (folder / MANIFEST).is_file()


def _read(folder: Path) -> dict[str, str]:
    """Names to digests; raises FileNotFoundError, OSError or ValueError."""
    said = json.loads((folder / MANIFEST).read_text("utf-8"), object_pairs_hook=_without_repeats)
    if not isinstance(said, dict) or not isinstance(said.get("files"), dict):
        raise ValueError('it is not an object with "algorithm" and "files"')
    if said.get("algorithm") != ALGORITHM:
        raise ValueError(f"its algorithm is {said.get('algorithm')!r}, not {ALGORITHM!r}")
    for name, digest in said["files"].items():
        if name in ("", ".", "..", MANIFEST) or set(name) & set("/\\\0"):
            raise ValueError(f"{name!r} is not the name of a file in the folder")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"what it has for {name} is not a SHA-256")
    return said["files"]


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


def _to_list(folder: Path) -> set[str]:
    """Names of the files that a manifest has to list."""
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if not entry.is_dir()}
    return {name for name in names if name != MANIFEST and (not name.startswith(".") or name == ".metadata")}


def _lacking(names: set[str]) -> list[str]:
    """What every checkpoint of the format torch_dist has, and these files lack."""
    lacking = [name for name in (".metadata", "metadata.json") if name not in names]
    return lacking if any(name.endswith(".distcp") for name in names) else [*lacking, "*.distcp"]


def _differs(folder: Path, name: str, digest: str) -> str:
    """What is wrong with one file; empty if nothing is."""
    path = folder / name
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} is a symbolic link out of the folder"
        if _digest(path) == digest:
            return ""
        return f"{name} ({path.stat().st_size:,} bytes) is not what was saved: its SHA-256 differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {_lasting(error, path)}"


def _lasting(error: OSError, path: Path) -> str:
    """A permanent fault of a file."""
    if passing(error):
        raise Unreachable(
            f"{path} cannot be read at the moment: {error.strerror}. If this persists, move the checkpoint away: the "
            "run resumes from an older one"
        ) from error
    return error.strerror or str(error)


def _digest(path: Path, sync: bool = False) -> str:
    """SHA-256 of a regular file in hexadecimal digits; with ``sync`` its data are on disk then."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stream:  # a pipe must not block
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, ALGORITHM).hexdigest()


def _threads(files: int) -> int:
    """Threads for this process: its part of the node's cores, as torchrun says how many processes share them."""
    share = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(share, files, MOST_THREADS))
