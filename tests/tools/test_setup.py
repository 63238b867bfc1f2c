"""The set-up script, the make targets and the CI script, run as a user runs them."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def run(command, cwd=ROOT, **environment):
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with the commands that every system has, and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sh", "dirname", "cat", "grep", "cksum", "date", "rm", "tail", "cut", "du", "sleep"):
        (directory / name).symlink_to(shutil.which(name))
    return directory


def find_python(path, **environment):
    environment = {"HOME": "/nonexistent"} | environment
    return run(["/bin/sh", "tools/setup_env.sh", "--find-python"], PATH=str(path), **environment)


def test_a_shim_that_fails_is_passed_over(tmp_path, bare_path):
    executable(bare_path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    executable(bare_path / "python3", "echo 'is Python 3.11.2'")
    good = executable(tmp_path / "pyenv/versions/3.12.9/bin/python", f'exec "{sys.executable}" "$@"')
    found = find_python(bare_path, PYENV_ROOT=str(tmp_path / "pyenv"))
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, str(good), "")


def test_python_variable_comes_first(tmp_path, bare_path):
    executable(bare_path / "python3.12", f'exec "{sys.executable}" "$@"')
    chosen = executable(tmp_path / "mine", f'exec "{sys.executable}" "$@"')
    assert find_python(bare_path, PYTHON=str(chosen)).stdout.strip() == str(chosen)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'is Python 3.11.2'", "mine is Python 3.11.2"),
        ("exit 1", "mine does not run"),
        (None, "mine is not there"),
    ],
)
def test_no_python_that_fits(tmp_path, bare_path, body, reason):
    chosen = tmp_path / "mine"
    if body:
        executable(chosen, body)
    found = find_python(bare_path, PYTHON=str(chosen))
    assert found.returncode == 2 and found.stdout == ""
    assert reason in found.stderr and "3.12 or 3.13" in found.stderr and "pyenv install" in found.stderr
    assert found.stderr.count("\n") == 1, "one paragraph"


def test_the_probe_refuses_what_has_no_wheels():
    """The probe itself, told that it runs on other Pythons."""
    script = (ROOT / "tools/setup_env.sh").read_text()
    probe = script.split("<<'PROBE'")[1].split("\n", 1)[1].split("\nPROBE")[0]

    def says(change):
        code = f"import sys, sysconfig\n{change}\n{probe}"
        return run([sys.executable, "-I", "-c", code]).stdout.strip()

    assert says("") == ""
    for numbers in ((3, 11, 9), (3, 14, 0), (2, 7, 18)):
        assert says(f"sys.version_info = {numbers}") == "is Python {}.{}.{}".format(*numbers)
    assert "free-threaded" in says("sysconfig.get_config_var = lambda name: 1")
    assert "without its module ensurepip" in says("sys.modules['ensurepip'] = None")


WHEEL = """
import zipfile


def write(path, name, file, text):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(file, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"{file},,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")


def build_editable(directory, config_settings=None, metadata_directory=None):
    import os

    name = "this-1.0-py3-none-any.whl"
    write(os.path.join(directory, name), "this", "this_one.pth", os.getcwd() + "\\n")
    return name
"""
"""A module that writes wheels, and is a build backend of which nothing has to be downloaded."""


def write_project(directory: Path) -> None:
    """A package `tiny` 1.0 as a wheel, and a project of its own with one module."""
    (directory / "backend.py").write_text(WHEEL)
    backend = runpy.run_path(str(directory / "backend.py"))
    backend["write"](directory / "tiny-1.0-py3-none-any.whl", "tiny", "tiny.py", "ANSWER = 42\n")
    build = 'requires = ["absent"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (directory / "pyproject.toml").write_text(f"[build-system]\n{build}")
    (directory / "own.py").write_text("ANSWER = 43\n")


def test_install_is_skipped_when_done_and_says_why_it_failed(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup_env.sh", tmp_path / "tools")
    write_project(tmp_path)
    requirements, stamp = tmp_path / "requirements.txt", tmp_path / ".venv/.installed-runtime"

    def setup(text):
        requirements.write_text(text)
        return run(
            ["/bin/sh", "tools/setup_env.sh"],
            cwd=tmp_path,
            PATH=os.defpath,
            HOME=str(tmp_path),
            PYTHON=sys.executable,
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS=str(tmp_path),
        )

    done = setup("tiny==1.0\n")
    assert done.returncode == 0 and "installed in" in done.stdout and stamp.exists()
    answer = run([str(tmp_path / ".venv/bin/python"), "-c", "import tiny; print(tiny.ANSWER)"])
    assert answer.stdout == "42\n"
    answer = run([str(tmp_path / ".venv/bin/python"), "-c", "import own; print(own.ANSWER)"], cwd="/")
    assert answer.stdout == "43\n" and f"this package installed from {tmp_path}" in done.stdout, done.stdout

    again = setup("tiny==1.0\n")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# another\n")
    assert setup("tiny==1.0\n").stdout == f"setup: this package installed from {tmp_path}\n"

    failed = setup("tiny==1.0\nnvidia-absent==1.0\n")
    assert failed.returncode == 1 and not stamp.exists()
    assert "No matching distribution found for nvidia-absent" in failed.stderr
    assert "the same command continues from there" in failed.stderr
    assert ".venv from" not in failed.stdout, "the environment is kept"


@pytest.mark.parametrize("program", ["tools/launch.py", "tools/plan.py", "tools/preprocess_data.py"])
def test_the_package_is_found_from_any_directory(tmp_path, program):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run([sys.executable, str(ROOT / program), "--help"], cwd=tmp_path, **environment)
    assert done.returncode == 0 and "usage: " in done.stdout, f"{done.stderr}: `make setup` installs it"


def test_unknown_argument():
    found = run(["/bin/sh", "tools/setup_env.sh", "--prod"], PATH=os.defpath)
    assert found.returncode == 2 and "--prod" in found.stderr


def pins(name: str) -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    found = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line)
        assert match, f"{name}: not an exact pin: {line}"
        found[match[1]] = match[2]
    return found


def test_requirements_are_pinned_and_installed():
    runtime, dev, gpu = map(pins, ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"))
    assert runtime["torch"] == "2.11.0" and runtime["megatron-core"] == "0.19.2"
    assert {"transformer-engine", "mamba-ssm", "causal-conv1d", "flash-attn"} == set(gpu)
    # A difference means that .venv is stale, or that a pin does not hold what the tests ran with.
    wrong = {name: version(name) for name, pin in (runtime | dev).items() if version(name) != pin}
    assert wrong == {}


def test_project_depends_on_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[=><~]", entry)[0] for entry in project["dependencies"]}
    assert names <= set(pins("requirements.txt"))
    assert project["requires-python"] == ">=3.12,<3.14"


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    shown = run(["make"], PATH=os.defpath).stdout
    assert re.findall(r"^  make (\S+)", shown, re.M) == targets


@pytest.mark.parametrize(("lint", "test", "passes"), [(0, 0, True), (1, 0, False), (0, 1, False), (0, 5, False)])
def test_ci_fails_when_a_step_fails(tmp_path, lint, test, passes):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(f"lint:\n\t@exit {lint}\ntest:\n\t@echo '1 passed'; exit {test}\n")
    done = run(["bash", ".ci/run"], cwd=tmp_path, PATH=os.defpath)
    assert (done.returncode == 0) is passes
    assert ("1 passed" in done.stdout) is (lint == 0)
