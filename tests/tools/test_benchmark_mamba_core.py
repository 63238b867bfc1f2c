"""tools/benchmarks/mamba_core.py, run as a user runs it, at sizes that take no time."""

import json

import pytest

from tests.support.processes import ROOT, python

TOOL = ROOT / "tools/benchmarks/mamba_core.py"
TINY = ["--device", "cpu", "--dtype", "float32", "--heads", "4", "--head-dim", "16", "--state", "16", "--repeats", "3"]


def test_report(tmp_path):
    done = python(TOOL, *TINY, "--cases", "64x2", "100x1", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(c["sizes"]["length"], c["sizes"]["batch"]) for c in report["cases"]] == [(64, 2), (100, 1)]
    for case in report["cases"]:
        (row,) = case["rows"]
        assert row["name"] == "torch" and row["correct"] and row["error"] < 1e-6
        assert len(row["times_ms"]) == len(row["forward_ms"]) == 3 and row["peak_mib"] > 0
        assert f"{row['median_ms']:10.3f}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "64"], "give tokens x samples"),
        (["--cases", "0x4"], "at least 1"),
        (["--search"], "--search needs a CUDA device"),
    ],
)
def test_mistakes(words, said):
    done = python(TOOL, *TINY, *words)
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
