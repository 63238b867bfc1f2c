"""The repository's own files: license, citation, hooks, and that documents name what exists."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
]
DOCUMENTS = sorted(path for path in FILES if path.suffix == ".md" and path.exists())
TOP = ("docs/", "examples/", "megatron_hybrid/", "tests/", "tools/", ".github/")
ROOMS = tuple(f"{path.name}/" for path in (ROOT / "megatron_hybrid").iterdir() if path.is_dir())
UPSTREAM = ("megatron/", "torchtitan/")
OF_THE_READER = ("my_layers.py",)


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)


def fences(text: str) -> list[str]:
    return re.findall(r"^ *```(?:sh|python)?\n(.*?)^ *```", text, flags=re.S | re.M)


def exists(word: str, document: Path) -> bool:
    """Whether a path is there: from the root, the package, or the document's folder; a bare name anywhere."""
    if any((base / word).exists() for base in (ROOT, ROOT / "megatron_hybrid", document.parent)):
        return True
    return "/" not in word and any(path.name == word for path in FILES)


def paths_in(text: str) -> set[str]:
    """What a document names in backticks that can only be a path of this repository."""
    found = set()
    for word in " ".join(re.findall(r"`([^`\n]+)`", text)).split():
        if not re.fullmatch(r"[\w./-]+", word) or word.startswith(UPSTREAM) or word in OF_THE_READER:
            continue
        ours = word.startswith(TOP) or word.startswith(ROOMS) and word.endswith("/")
        if ours or re.search(r"\w\.(py|sh|sbatch|cff|md)$", word):
            found.add(word)
    return found


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_relative_links_resolve(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_fences(document.read_text()))
    local = [target.partition("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_paths_in_backticks_exist(document):
    text = without_fences(document.read_text())
    assert sorted(word for word in paths_in(text) if not exists(word, document)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_programs_in_commands_exist(document):
    commands = "\n".join(fences(document.read_text()))
    programs = re.findall(r"(?<![\w/.-])(?:tools|examples|tests|docs)/[\w/.-]+\.(?:py|sh|sbatch)\b", commands)
    assert [program for program in programs if not (ROOT / program).exists()] == []


def test_a_path_that_is_gone_is_found(tmp_path):
    text = "`costs/gone.py`, `gone.py`, `tools/`, `metrics.jsonl`, `runs/1b`, `megatron/core/gone.py`, `make README.md`"
    assert paths_in(text) == {"costs/gone.py", "gone.py", "tools/", "README.md"}
    assert [word for word in sorted(paths_in(text)) if not exists(word, ROOT / "README.md")] == [
        "costs/gone.py",
        "gone.py",
    ]


def test_files_that_contributors_look_for():
    for name in ("LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        assert (ROOT / name).stat().st_size > 500, name
    for name in ("bug", "feature", "question"):
        template = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        assert template["name"] and template["description"], name
        assert any(part.get("validations", {}).get("required") for part in template["body"]), name


def test_license_is_the_same_everywhere():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"
    assert citation()["license"] == "Apache-2.0"
    assert "[Apache-2.0](LICENSE)" in (ROOT / "README.md").read_text()


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_citation_is_of_this_version_and_of_the_paper():
    assert citation()["version"] == PROJECT["version"]
    (paper,) = citation()["references"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in readme and paper["url"] in readme
    assert paper["authors"][0] == {"family-names": "Bae", "given-names": "Sangmin"}


def test_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and PROJECT["version"] in headings


def test_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    planned = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in planned.splitlines() if " -m " in line]
    assert len(commands) == 3
    assert [hook["entry"] for hook in hooks] == commands
