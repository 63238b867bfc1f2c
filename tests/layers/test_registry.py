"""The table of layers: what it takes, what it refuses, and that nothing else knows a symbol."""

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.saved import Rank
from megatron_hybrid.accounting.traffic import CommunicationSettings, MicroBatch
from megatron_hybrid.layers import LAYERS, Account, NotDeclared, registry
from tests.costs.test_costs import SMALL

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hybrid"


class Empty(Account):
    """Declares nothing."""


def test_what_a_layer_does_not_declare_raises_by_name():
    empty, layout = Empty(), Layout()
    asked = {
        "linears": (SMALL,),
        "tensors": (SMALL, SMALL, 1),
        "eight_bit_linears": (SMALL, SMALL, 1),
        "conv_flops": (SMALL,),
        "core_flops": (SMALL, "model"),
        "recomputed_flops": (SMALL, frozenset()),
        "cache": (SMALL, 10),
        "saved": (Rank(SMALL, layout, ActivationSettings()),),
        "exchanges": (MicroBatch(SMALL, layout, CommunicationSettings()),),
        "shared_by_ranks": (SMALL, 2),
        "not_cut": (SMALL,),
    }
    for method, arguments in asked.items():
        with pytest.raises(
            NotDeclared, match=rf"The layer \? \(not registered\) does not declare .* {method} in .*Empty"
        ):
            getattr(empty, method)(*arguments)
    for attribute in ("empty_mlp", "recompute"):
        with pytest.raises(NotDeclared, match=attribute):
            getattr(empty, attribute)
    with pytest.raises(AttributeError):
        empty.no_such_thing  # noqa: B018


def test_every_layer_declares_everything():
    needed = {name for name, value in vars(Account).items() if callable(value) and not name.startswith("_")}
    needed -= {"sizes", "stored_differences", "measured", "describe", "kernels", "eight_bit_flops", "reads_in_8_bits"}
    needed -= {"parameters", "flops", "between_projections"}
    assert len(needed) == 11
    for layer in LAYERS.values():
        for name in needed:
            assert getattr(type(layer.account), name) is not getattr(Account, name), (layer.symbol, name)
        assert layer.account.recompute is not None and layer.account.empty_mlp in (True, False)
        folder = PACKAGE / Path(*layer.module.split(".")[1:-1])
        assert {"account.py", "module.py", "check.py"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        ("M", "'M' of the layer 'twin' is that of 'Mamba-2'; taken are"),
        ("D", "sparse attention"),
        ("|", "without another meaning"),
        ("AB", "take one letter or sign"),
        (" ", "take one letter or sign"),
        ("é", "take one letter or sign"),
    ],
)
def test_symbols_that_are_refused(symbol, words):
    before = dict(LAYERS)
    with pytest.raises(ValueError, match=words):
        registry.register(replace(LAYERS["M"], symbol=symbol, name="twin"))
    assert before == LAYERS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        ("x = 1\n", "it registers no layer"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "no_such_module"),
        (
            "from megatron_hybrid.layers import LAYERS, register\nregister(LAYERS['M'])\n",
            "'M' of the layer 'Mamba-2' is that of 'Mamba-2'",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    file = tmp_path / f"layers_{abs(hash(content))}.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        registry.load([file])
    assert str(file) in str(error.value)


def test_an_account_belongs_to_one_layer():
    with pytest.raises(ValueError, match="the account of the layer 'twin' is that of 'M' already"):
        registry.register(replace(LAYERS["M"], symbol="Q", name="twin"))
    assert "Q" not in LAYERS and LAYERS["M"].account.symbol == "M"


def started(folder, *words):
    """pretrain_hybrid.py in a copy of its own, whose folder is the first place that Python imports from."""
    shutil.copy(ROOT / "pretrain_hybrid.py", folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "pretrain_hybrid.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_files_beside_the_program_and_files_that_import_one_another(tmp_path):
    for name in ("short_conv.py", "short_conv_mixer.py"):
        shutil.copy(ROOT / "examples/custom_layer" / name, tmp_path)
    (tmp_path / "both.py").write_text("import short_conv\n")
    done = started(tmp_path, "--layers-from", "both.py", "short_conv.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--short-conv-taps" in done.stdout and "taps of the convolution" in done.stdout


def test_a_package_that_fails_is_named(tmp_path):
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[megatron_hybrid.layers]\nbroken = no_such_layer\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "pretrain_hybrid.py"), "--hybrid-layer-pattern", "M-"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "installed package broken (no_such_layer) cannot be loaded: ModuleNotFoundError" in done.stderr


def test_a_mistake_in_the_file_ends_the_program_with_one_paragraph(tmp_path):
    (tmp_path / "json.py").write_text("")
    command = [sys.executable, "pretrain_hybrid.py", "--layers-from", str(tmp_path / "json.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is another module json; rename the file" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_installed_package_registers_its_layers(tmp_path):
    about = tmp_path / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[megatron_hybrid.layers]\noutside = outside_layer\n")
    (tmp_path / "outside_layer.py").write_text(
        "from dataclasses import replace\n"
        "from megatron_hybrid.layers import LAYERS, register\n"
        "from megatron_hybrid.layers.mamba.account import MambaAccount\n"
        "register(replace(LAYERS['M'], symbol='Q', name='outside', account=MambaAccount()))\n"
    )
    code = "from megatron_hybrid.cli import flags; print(flags.resolve(['--hybrid-layer-pattern', '(Q-)2*-']).pattern)"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "Q-Q-*-\n", done.stderr


# Letters of symbols ------------------------------------------------------------------------------------

AWAY = ("layers", "data", "run_folder", "launch")
"""Folders that may compare letters: the layers themselves, and those where "-" and "M" mean other things."""
LANGUAGE = ("pattern.py", "placement.py")


def letters(node: ast.AST) -> list[str]:
    """Strings of one or more symbols in an expression."""
    strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [s for s in strings if s and set(s) <= set(LAYERS)]


def comparisons(source: str) -> list[tuple[int, list[str]]]:
    """Lines that compare with a symbol's letter, look one up, or choose by one in a table."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        simple = [p for p in parts if isinstance(p, (ast.Constant, ast.Tuple, ast.Set, ast.List, ast.Call, ast.Dict))]
        hits = [letter for part in simple for letter in letters(part)]
        if hits:
            found.append((node.lineno, hits))
    return found


def test_the_search_finds_letters():
    assert comparisons("if symbol == 'M': pass") and comparisons("x in '*W'") and comparisons("t = {'P': 1}")
    assert (
        comparisons("counts['E']") and comparisons("s in ('M', 'P')") and comparisons("set(s) & set('MP') == set('W')")
    )
    assert not comparisons("flag == '--x'; unit = 'M'; print('P')")


def test_no_letter_of_a_symbol_is_compared_outside_of_layers():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] in AWAY or str(path.relative_to(PACKAGE)) in LANGUAGE:
            continue
        hits = comparisons(path.read_text())
        if hits:
            found[str(path.relative_to(PACKAGE))] = hits
    assert found == {}
