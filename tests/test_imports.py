"""The order of the package's rooms, read from the imports of its files, those inside functions included."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_hybrid"
ORDER = [
    ["", "files", "pictures", "argv", "errors", "die_with_parent"],
    ["kernels"],
    ["accounting"],
    ["layers"],
    ["pattern"],
    ["placement"],
    ["costs"],
    ["patches"],
    ["data"],
    ["run_folder"],
    ["model"],
    ["checkpoint"],
    ["training"],
    ["cli"],
    ["launch", "plan"],
    ["benchmarks"],
]
"""Rooms, and files at the top, from the lowest up; the package itself is the empty name. Rooms of one line do not know
each other; files of the first do."""
KNOWN: dict[str, set[str]] = {}
"""File to the modules that it imports against the order: to be empty."""
UPSTREAM = {"torch", "megatron"}
SAME_NAME = {"__init__", "account", "module", "check"}
"""Names that several rooms may have for their files."""
NO_TORCH = ["layers/*/account.py", "layers/*/check.py", "layers/registry.py", "accounting/*.py"]
"""Files that import neither torch nor Megatron, at no place."""


def files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """What is imported anywhere in a file: the module, and the name that is taken from it (or nothing)."""
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((alias.name, "") for alias in n.names)
        elif isinstance(n, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - n.level + is_package] if n.level else []
            source = ".".join([*parents, *filter(None, [n.module])])
            yield from ((source, alias.name) for alias in n.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for source, name in imports_of(ast.parse(path.read_text()), module_of(path), path.stem == "__init__"):
        module = f"{source}.{name}" if f"{source}.{name}" in MODULES else source
        if module.split(".")[0] == PACKAGE:
            assert module in MODULES, f"{path} imports {module}, which is no file"
            found.add(module)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def place(module: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room(module) in rooms)


def test_every_room_has_a_place():
    assert {room(module) for module in MODULES} <= {name for rooms in ORDER for name in rooms}


def test_no_file_imports_upwards():
    against: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        for imported in own_imports(path):
            sideways = place(imported) == place(module) > 0 and room(imported) != room(module)
            if place(imported) > place(module) or sideways:
                against[str(path.relative_to(ROOT / PACKAGE))].add(imported)
    assert dict(against) == KNOWN


def test_no_files_import_one_another_in_a_circle():
    """A package counts as its __init__.py; that a file of it is imported says nothing about the others."""
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def circle(module: str, way: tuple[str, ...]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        found = next((c for other in sorted(graph[module]) if (c := circle(other, (*way, module)))), [])
        done.add(module)
        return found

    assert [found for module in graph if (found := circle(module, ()))] == []


def upstream_names(tree: ast.Module) -> set[str]:
    """Names that a file has from torch or Megatron: modules, classes and functions."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0] for a in n.names if a.name.split(".")[0] in ("torch", "megatron")
            }
        elif isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] in UPSTREAM:
            found |= {a.asname or a.name for a in n.names}
    return found


def root_of(target: ast.expr) -> str:
    while isinstance(target, ast.Attribute):
        target = target.value
    return target.id if isinstance(target, ast.Name) else ""


def assigned(tree: ast.Module) -> Iterator[ast.expr]:
    """Attributes that a file assigns, deletes, or sets by setattr (the object stands for all of its attributes)."""
    for n in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(n, ast.Assign | ast.Delete):
            targets = n.targets
        elif isinstance(n, ast.AugAssign | ast.AnnAssign):
            targets = [n.target]
        elif isinstance(n, ast.Call) and ast.unparse(n.func) in ("setattr", "delattr", "vars", "patch.object"):
            targets = [ast.Attribute(n.args[0], "*")] if n.args and ast.unparse(n.func) != "vars" else []
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(one, ast.Attribute):
                    yield one


def holding_names(tree: ast.Module, names: set[str]) -> set[str]:
    """Local names of upstream's modules and classes: what is imported, and what is bound to an attribute of it."""
    found = set(names)
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Attribute) and root_of(n.value) in names:
            found |= {t.id for t in n.targets if isinstance(t, ast.Name)}
        elif isinstance(n, ast.Assign) and isinstance(n.value, ast.Call):
            called = ast.unparse(n.value.func)
            text = ast.unparse(n.value)
            if called.endswith("import_module") and re.search(r"\(['\"](torch|megatron)\b", text):
                found |= {t.id for t in n.targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("path", files() + [ROOT / "pretrain_hybrid.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_only_patches_assigns_into_megatron_and_torch(path):
    if PACKAGE in path.parts and "patches" in path.parts:
        return
    tree = ast.parse(path.read_text())
    names = holding_names(tree, upstream_names(tree))
    assert [ast.unparse(target) for target in assigned(tree) if root_of(target) in names] == []


def outside(path: Path) -> set[str]:
    """Top names of everything that a file imports."""
    return {source.split(".")[0] for source, _ in imports_of(ast.parse(path.read_text()), module_of(path), False)}


def test_the_agent_alone_imports_torch_in_launch():
    importing = [
        path.name for path in (ROOT / PACKAGE / "launch").glob("*.py") if {"torch", "megatron"} & outside(path)
    ]
    assert importing == ["agent.py"]


def test_the_agent_is_imported_where_it_is_run_alone():
    agent = f"{PACKAGE}.launch.agent"
    at_module_level = []
    for module, path in MODULES.items():
        top = ast.Module(
            [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        found = imports_of(top, module, path.stem == "__init__")
        at_module_level += [module for source, name in found if agent in (source, f"{source}.{name}")]
    assert at_module_level == []
    assert [module for module, path in MODULES.items() if agent in own_imports(path)] == [f"{PACKAGE}.launch.jobs"]


def test_accounts_and_checks_of_layers_import_neither_torch_nor_megatron():
    for pattern in NO_TORCH:
        for path in (ROOT / PACKAGE).glob(pattern):
            assert not UPSTREAM & outside(path), path


def test_no_two_modules_have_one_name():
    """A file may have the name of a room or of a layer: cli/flag_table/training.py, kernels/attention.py."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        by_name[path.stem].append(module)
    several = {name for name, found in by_name.items() if len(found) > 1} - SAME_NAME
    assert several == set()


# That these tests would notice -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.cuda.synchronize = None",
        "from megatron.training import training\ndef f():\n    training.train = 1",
        "def f():\n    from megatron.training import training as t\n    t.train, x = 1, 2",
        "from megatron.core.optimizer import Adam\nsetattr(Adam, name, 1)",
        "import importlib\nm = importlib.import_module('megatron.core')\nm.x = 1",
        "import torch\nt = torch.cuda\nt.x = 1",
        "import torch\ndel torch.x",
    ],
)
def test_an_assignment_is_found(code):
    tree = ast.parse(code)
    names = holding_names(tree, upstream_names(tree))
    assert [target for target in assigned(tree) if root_of(target) in names]


def test_imports_are_found_wherever_they_are():
    code = "import a\nfrom . import b\ndef f():\n    from ..c import d\nif TYPE_CHECKING:\n    from e import f"
    found = set(imports_of(ast.parse(code), "p.q.r", False))
    assert found == {("a", ""), ("p.q", "b"), ("p.c", "d"), ("e", "f")}
    assert set(imports_of(ast.parse("from .x import y"), "p.q", True)) == {("p.q.x", "y")}
