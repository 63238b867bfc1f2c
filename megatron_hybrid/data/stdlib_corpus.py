"""A small corpus of real text that every machine with Python has: its standard library.

Each module gives up to two documents: its sources without the docstrings, and the docstrings as
prose. No sentence is in both, so a validation split cannot be read in the training split.
"""

import ast
import hashlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_DIRECTORIES = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "ensurepip", "encodings", "lib-dynload", "__pycache__",
}  # fmt: skip
"""Not part of the library's own text: packages of others, tests, applications, character tables."""

MIN_CHARACTERS, MAX_CHARACTERS = 200, 300_000
"""Shorter documents teach nothing; longer ones are tables."""

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents(root: Path) -> list[str]:
    """Return the documents of the library under ``root``, each once.

    They are ordered by the hash of their text: the order is the same on every run, and the ends
    that Megatron's --split cuts off are samples of the whole. Raises ValueError if ``root`` has no
    sources (some systems ship them as a package of their own).
    """
    found: dict[str, str] = {}
    for path in source_files(root):
        for text in documents_of(path):
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                found.setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    if not found:
        raise ValueError(
            f"{root} contains no Python sources; give the directory of a complete standard library with --source."
        )
    return [found[digest] for digest in sorted(found)]


def source_files(root: Path) -> list[Path]:
    """Return the modules under ``root``, sorted, without SKIPPED_DIRECTORIES."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if path.is_file()
        and not SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts[:-1])
        and not path.name.startswith("_sysconfigdata")
    )


def documents_of(path: Path) -> Iterator[str]:
    """Yield the documents of one module; none if it is not valid Python in UTF-8."""
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return
    topics = help_topics(tree)
    if topics:
        yield from map(clean, topics)
        return
    yield clean(without_docstrings(source, tree))
    yield clean(prose(tree))


def help_topics(tree: ast.Module) -> list[str]:
    """Return the texts of ``pydoc_data/topics.py``, the language reference: a dict of strings."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "topics"
            and isinstance(node.value, ast.Dict)
        ):
            values = node.value.values
            return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return []


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield the module, classes and functions of a tree that have a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, Definition) and ast.get_docstring(node, clean=False):
            yield node


def prose(tree: ast.Module) -> str:
    """Return the docstrings of a module, in the order of the source, each under its name."""
    parts = []
    for node in sorted(definitions(tree), key=lambda node: getattr(node, "lineno", 0)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        parts.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return "\n\n".join(parts)


def without_docstrings(source: str, tree: ast.Module) -> str:
    """Return a module's source with its docstrings taken out ('...' where nothing else is left)."""
    lines = source.splitlines()
    for node in definitions(tree):
        string = node.body[0]
        first, last = string.lineno - 1, (string.end_lineno or string.lineno) - 1
        before = lines[first][: string.col_offset]
        # Offsets count bytes; a line with more than indentation before it is left as it is.
        if before.strip():
            continue
        lines[first : last + 1] = [""] * (last + 1 - first)
        if len(node.body) == 1:
            lines[first] = before + "..."
    return "\n".join(lines)


def clean(text: str) -> str:
    """Return text without trailing spaces, with at most two blank lines in a row."""
    kept: list[str] = []
    for line in text.expandtabs().splitlines():
        line = line.rstrip()
        if line or kept[-2:] != ["", ""]:
            kept.append(line)
    return "\n".join(kept).strip("\n") + "\n"
