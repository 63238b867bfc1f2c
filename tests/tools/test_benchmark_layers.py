"""tools/benchmarks/layers.py, run as a user runs it, at sizes that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks import layers

ROOT = Path(__file__).resolve().parents[2]
# Wide enough for the FLOPs of the products to outweigh the rest; a branch of 128 beside one of 64.
TINY = """--hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --mamba-num-heads 4 --intra-qk-dim 32
--intra-value-dim 64 --intra-ssm-dim 128 --mamba-state-dim 16 --device cpu --length 48 --repeats 1"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which hymba does not fit the widths: what it printed and what it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "tools/benchmarks/layers.py", *TINY.split(), "--layers=*MP"]
    command += ["--presets=paper,diff-mamba,hymba", f"--json={folder}/out.json", f"--plot={folder}/out.png"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    return done, json.loads((folder / "out.json").read_text())


def row(report, preset, name):
    (found,) = [r for r in report["rows"] if (r["preset"], r["name"]) == (preset, name)]
    return found


def test_rows(run):
    done, report = run
    names = {"": ["*", "M"], "hymba": ["P"]}
    names["paper"] = ["P", "attention alone", "mamba alone", "one after the other"]
    names["diff-mamba"] = ["P", "mamba alone", "one after the other"]
    for preset, wanted in names.items():
        assert [r["name"] for r in report["rows"] if r["preset"] == preset] == wanted
    for r in report["rows"]:
        assert f"{r['preset']:17}{r['name']:20}" in done.stdout, "the table shows it"
        if "error" in r:
            continue
        assert len(r["times_ms"]) == 1 and r["tokens_per_s"] == pytest.approx(48e3 / r["median_ms"])
        # At this size a layer is hundreds of calls of some microseconds each, and its products take less than one of
        # them: far below what one large product reaches, however busy the machine is.
        assert 0 < r["roofline_percent"] <= 100
        assert r["peak_mib"] > 0
    assert "torch 2." in done.stdout and "CUDA_DEVICE_MAX_CONNECTIONS" in done.stdout


def test_a_layer_that_is_refused_shows_its_error(run):
    done, report = run
    assert done.returncode == 1
    assert "equally wide" in row(report, "hymba", "P")["error"] and "equally wide" in done.stdout
    assert all(r["preset"] != "hymba" for r in report["ratios"])


def test_ratios_are_those_of_the_rows(run):
    _, report = run
    assert [(r["preset"], r["to"]) for r in report["ratios"]] == [
        (preset, rival) for preset in ("paper", "diff-mamba") for rival in ("sum of both alone", "one after the other")
    ]
    ours, mamba = (row(report, "diff-mamba", name)["median_ms"] for name in ("P", "mamba alone"))
    alone, in_turn = report["ratios"][2:]
    assert alone["ratio"] == pytest.approx(ours / (2 * mamba)), "one mixer is measured for two that are alike"
    other = row(report, "diff-mamba", "one after the other")["median_ms"]
    assert in_turn["ratio"] == pytest.approx(ours / other) and in_turn["ratio"] > 0


def test_the_separate_mixers_do_the_same_work(run):
    """Fusing saves no FLOPs: same widths, heads and cores in both. Layers in turn only add their times."""
    _, report = run
    alone = sum(row(report, "paper", f"{kind} alone")["flops"] for kind in ("attention", "mamba"))
    assert row(report, "paper", "P")["flops"] == pytest.approx(alone, rel=1e-12)
    assert row(report, "paper", "one after the other")["flops"] == pytest.approx(alone, rel=1e-12)


def test_least_traffic(run):
    """Counted by hand: q of 32 rows, k of 2 heads x 8, v of 2 heads x 16; values of 4 heads x 16 go back; fp32."""
    _, report = run
    weights = 64 * (32 + 16 + 32) + 64 * 64 + 64
    activations = 48 * (64 + (32 + 16 + 32) + 64)
    assert row(report, "paper", "attention alone")["bytes"] == 4 * (3 * weights + 5 * activations)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "falcon"], "the presets are paper,hymba"),
        (["--layers", "Q"], "choose from *WMP-"),
        (["--length", "8k"], "whole numbers"),
        (["--size", "small", "--recipe", "demo"], "give one"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        layers.parse_options(arguments)
    assert message in capsys.readouterr().err
