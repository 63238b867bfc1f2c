"""Checkpoints of a run's folder: what is detected, which one is chosen, which are removed."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.run_folder import checkpoints as c

ROOT = Path(__file__).parents[2]
FILES = {
    ".metadata": b"\x80\x04 a pickle",
    "metadata.json": b'{"sharded_backend": "torch_dist"}',
    "__0_0.distcp": bytes(range(256)) * 40,
    "__0_1.distcp": b"",
    "__1_0.distcp": b"second rank" * 99,
}


def save(run: Path, *iterations: int, sealed: bool = True) -> list[Path]:
    """Checkpoints with files of every kind."""
    folders = [run / f"iter_{iteration:07d}" for iteration in iterations]
    for folder in folders:
        folder.mkdir(parents=True)
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        if sealed:
            c.seal(folder)
    return folders


def point(run: Path, text: str) -> None:
    (run / c.POINTER).write_text(text)


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, 30)[0]


# What is wrong with a checkpoint ---------------------------------------------------------------------


def test_the_manifest_is_upstreams_to_the_byte(folder):
    """validation.py, save_integrity_manifest: json.dump(payload, indent=2) with names in order."""
    digests = {name: hashlib.sha256(FILES[name]).hexdigest() for name in sorted(FILES)}
    expected = json.dumps({"algorithm": "sha256", "files": digests}, indent=2)
    assert (folder / "integrity.json").read_text() == expected
    assert c.problems(folder) == []


@pytest.mark.parametrize("name", [*FILES, "integrity.json"])
def test_any_damage_to_any_file_is_found(folder, name):
    path, generator = folder / name, random.Random(name)
    whole = path.read_bytes()
    path.unlink()
    assert c.problems(folder) != []
    lengths = range(len(whole)) if len(whole) < 1000 else generator.sample(range(len(whole)), 50)
    for length in lengths:
        path.write_bytes(whole[:length])
        assert c.problems(folder) != [], f"cut to {length} bytes"
    for place in range(len(whole)) if len(whole) < 1000 else generator.sample(range(len(whole)), 50):
        corrupt = bytearray(whole)
        corrupt[place] ^= 1 << generator.randrange(8)
        path.write_bytes(corrupt)
        if name == "integrity.json" and corrupt.split() == whole.split():
            continue  # white space for white space says the same
        assert c.problems(folder) != [], f"byte {place} flipped"
    path.write_bytes(whole + b"\0")
    assert c.problems(folder) != []
    path.write_bytes(bytes(len(whole)))
    assert (c.problems(folder) != []) == bool(whole)  # a hole of the file's length
    path.write_bytes(whole)
    assert c.problems(folder) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a manifest"),
        ("[]", "not an object"),
        ("{}", "not an object"),
        ('{"algorithm": "sha256", "files": []}', "not an object"),
        ('{"files": {}}', "algorithm is None"),
        ('{"algorithm": "md5", "files": {}}', "algorithm is 'md5'"),
        ('{"algorithm": "sha256", "files": {}}', "does not list .metadata"),
        ('{"algorithm": "sha256", "files": {"../a": "%s"}}', "'../a' is not the name"),
        ('{"algorithm": "sha256", "files": {"..": "%s"}}', "'..' is not the name"),
        ('{"algorithm": "sha256", "files": {"/etc/hosts": "%s"}}', "is not the name"),
        ('{"algorithm": "sha256", "files": {"integrity.json": "%s"}}', "is not the name"),
        ('{"algorithm": "sha256", "files": {"a": "%s", "a": "%s"}}', "has a name twice"),
        ('{"algorithm": "sha256", "files": {"a": "abc"}}', "not a SHA-256"),
        ('{"algorithm": "sha256", "files": {"a": 5}}', "not a SHA-256"),
        ("\x00" * 500, "is not a manifest"),
        ("[" * 100_000, "is not a manifest"),
    ],
)
def test_a_manifest_that_is_none_is_a_problem_in_every_share(folder, text, words):
    (folder / "integrity.json").write_text(text.replace("%s", "0" * 64))
    for part in range(2):
        assert words in "; ".join(c.problems(folder, part, 2))


def test_shares_hash_each_file_once(folder):
    for parts in (1, 2, 3, 9):
        for name in FILES:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole + b"x")
            told = [text for part in range(parts) for text in c.problems(folder, part, parts)]
            assert len(told) == 1 and told[0].startswith(name), told
            (folder / name).write_bytes(whole)


def test_what_a_manifest_must_list(folder):
    (folder / "__2_0.distcp").write_bytes(b"of an older save")
    (folder / "common.pt").write_bytes(b"would be loaded in place of the common state")
    (folder / ".nfs0001").write_bytes(b"a file system's own")
    (folder / "notes").mkdir()
    assert c.problems(folder) == [
        "integrity.json does not list __2_0.distcp",
        "integrity.json does not list common.pt",
    ]


def test_links_stay_in_the_folder_and_pipes_do_not_block(folder, tmp_path):
    (folder / "__0_0.distcp").rename(folder / ".data")
    (folder / "__0_0.distcp").symlink_to(".data")
    assert c.problems(folder) == []
    (folder / ".data").rename(tmp_path / "data")
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to(tmp_path / "data")
    assert c.problems(folder) == ["__0_0.distcp is a symbolic link out of the folder"]
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")
    assert c.problems(folder) == ["__0_0.distcp cannot be read: __0_0.distcp is not a regular file"]
    (tmp_path / "iter_0000040").symlink_to(folder)  # a checkpoint elsewhere
    assert [found.iteration for found in c.checkpoints(tmp_path)] == [40, 30]


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_half_a_checkpoint_is_not_sealed(tmp_path, name):
    (folder,) = save(tmp_path, 1, sealed=False)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"it has no {name}"):
        c.seal(folder)
    assert not c.is_sealed(folder)


# Which one to load -----------------------------------------------------------------------------------


def chosen(run: Path, step: int | None = None) -> int | str | None:
    found = c.choose(run, step, c.problems).checkpoint
    return None if found is None else "release" if found.release else found.iteration


def tear(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes(b"junk")


def test_a_run_that_has_not_saved_has_nothing_to_load(tmp_path):
    assert chosen(tmp_path) is None and chosen(tmp_path / "nowhere") is None
    (tmp_path / "iter_30").mkdir()  # not upstream's name
    (tmp_path / ".deleting-iter_0000030.1").mkdir()
    (tmp_path / "iter_0000040").write_text("a file")
    assert chosen(tmp_path) is None
    point(tmp_path, "30")
    with pytest.raises(ValueError, match="and no checkpoint"):
        chosen(tmp_path)


def test_a_valid_pointer_is_followed_back(tmp_path):
    save(tmp_path, 10, 20, 30)
    point(tmp_path, "20\n")
    found = c.choose(tmp_path, None, c.problems)
    assert found.checkpoint.iteration == 20
    assert "newer checkpoints exist (iter_0000030)" in "".join(found.notes)
    point(tmp_path, "30")
    assert c.choose(tmp_path, None, c.problems).notes == []


@pytest.mark.parametrize("text", [None, "", "garbage", "-1", "3_0", "99", "30 20", "٣٠", "\x00\x00", "9" * 5000])
def test_a_pointer_that_leads_nowhere_gives_way_to_the_newest_whole_one(tmp_path, text):
    folders = save(tmp_path, 10, 20, 30)
    if text is not None:
        point(tmp_path, text)
    found = c.choose(tmp_path, None, c.problems)
    assert found.checkpoint.iteration == 30
    assert c.POINTER in found.notes[0]
    tear(folders[2])
    found = c.choose(tmp_path, None, c.problems)
    assert found.checkpoint.iteration == 20
    assert "iter_0000030: __1_0.distcp (4 bytes)" in found.notes[0]


def test_the_pointers_one_is_corrupt(tmp_path):
    folders = save(tmp_path, 10, 20, 30, 40)
    point(tmp_path, "30")
    tear(folders[2])
    assert chosen(tmp_path) == 40
    tear(folders[3])
    assert chosen(tmp_path) == 20
    (folders[1] / "integrity.json").unlink()
    assert chosen(tmp_path) == 10
    shutil.rmtree(folders[2])
    assert chosen(tmp_path) == 10
    tear(folders[0])
    with pytest.raises(ValueError, match="no valid one; a run does not start from random weights") as error:
        chosen(tmp_path)
    for text in ("iter_0000040: __1_0", "iter_0000020: has no manifest", "iter_0000010: __1_0", "--seal"):
        assert text in str(error.value)


def test_what_cannot_be_read_just_now_is_not_called_corrupt(tmp_path, monkeypatch):
    """A network file system that fails for a moment: the newest checkpoint must not be skipped for an older one."""
    folders = save(tmp_path, 10, 20)
    os_open = os.open

    def failing(path, *args, **kwargs):
        if "iter_0000020" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return os_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    code = errno.EIO
    with pytest.raises(c.Unreachable, match="iter_0000020.*cannot be read at the moment: Input/output error"):
        chosen(tmp_path)
    code = errno.ELOOP  # that is the checkpoint's own
    assert chosen(tmp_path) == 10
    assert c.problems(folders[0]) == []


def test_a_step_that_is_asked_for_is_that_or_an_error(tmp_path):
    folders = save(tmp_path, 10, 20)
    point(tmp_path, "20")
    assert chosen(tmp_path, 10) == 10
    with pytest.raises(ValueError, match="--ckpt-step 15: .*its iterations are: 20, 10"):
        chosen(tmp_path, 15)
    tear(folders[0])
    with pytest.raises(ValueError, match="--ckpt-step 10: .*__1_0.distcp"):
        chosen(tmp_path, 10)


def test_a_release_is_the_oldest(tmp_path):
    save(tmp_path, 0)[0].rename(tmp_path / "release")
    assert chosen(tmp_path) == "release"
    save(tmp_path, 0)
    assert chosen(tmp_path) == 0
    point(tmp_path, "release")
    assert chosen(tmp_path) == "release"
    c.point_to(tmp_path, c.checkpoints(tmp_path)[0])
    assert (tmp_path / c.POINTER).read_text() == "0" and c.pointer(tmp_path) == 0


# Retention -------------------------------------------------------------------------------------------


def left(run: Path) -> list[int]:
    return [found.iteration for found in c.checkpoints(run)]


def test_retention_keeps_the_last_the_marked_and_what_is_not_its_own(tmp_path):
    folders = save(tmp_path, 10, 20, 30, 40, 50, 60)
    save(tmp_path, 25, sealed=False)
    point(tmp_path, "30")
    assert c.remove_old(tmp_path, None, None, folders[4]) == []
    removed = c.remove_old(tmp_path, 2, 20, folders[4])  # 60 is of before a roll back
    assert removed == [folders[0]]
    assert left(tmp_path) == [60, 50, 40, 30, 25, 20]
    assert c.remove_old(tmp_path, 1, None, folders[4]) == [folders[3], folders[1]]
    assert left(tmp_path) == [60, 50, 30, 25]
    assert not list(tmp_path.glob(".deleting-*"))


def test_retention_needs_a_sealed_checkpoint(tmp_path):
    save(tmp_path, 10, 20)
    (unsealed,) = save(tmp_path, 30, sealed=False)
    for sealed in (unsealed, tmp_path / "iter_0000099"):
        with pytest.raises(ValueError, match="is not a sealed checkpoint"):
            c.remove_old(tmp_path, 1, None, sealed)
    with pytest.raises(ValueError, match="keep_last is 0"):
        c.remove_old(tmp_path, 0, None, tmp_path / "iter_0000020")
    assert left(tmp_path) == [30, 20, 10]


def test_what_an_interrupted_removal_left_is_cleared(tmp_path):
    (folder,) = save(tmp_path, 10)
    shutil.copytree(folder, tmp_path / ".deleting-iter_0000005.77")
    c.remove_old(tmp_path, 1, None, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]


# By hand ---------------------------------------------------------------------------------------------


def verify(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools/verify_checkpoint.py", *words], capture_output=True, text=True, timeout=300
    )


def test_the_tool_says_what_is_whole(tmp_path):
    folders = save(tmp_path, 10, 20, 30)
    point(tmp_path, "20")
    tear(folders[0])
    done = verify(str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith(str(folders[1])) and done.stdout.endswith("valid\n")
    every = verify(str(tmp_path), "--all", "--json")
    assert every.returncode == 1
    told = json.loads(every.stdout)
    assert [finding["folder"] for finding in told] == [str(path) for path in reversed(folders)]
    assert [bool(finding["problems"]) for finding in told] == [False, False, True]
    lines = verify(str(folders[0]))
    assert lines.returncode == 1 and "NOT VALID\n    __1_0.distcp (4 bytes) is not what was saved" in lines.stdout


def test_the_tool_seals_what_has_no_manifest(tmp_path):
    (folder,) = save(tmp_path, 10, sealed=False)
    assert verify(str(tmp_path)).returncode == 1
    for wrong, words in ((tmp_path, "give its own folder"), (tmp_path / "nowhere", "is not a folder")):
        done = verify("--seal", str(wrong))
        assert done.returncode == 2 and words in done.stderr and done.stderr.startswith("error: ")
    done = verify("--seal", str(folder))
    assert (done.returncode, done.stderr) == (0, "") and c.problems(folder) == []
    again = verify("--seal", str(folder))
    assert again.returncode == 2 and "it has a manifest" in again.stderr
