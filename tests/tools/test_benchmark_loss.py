"""tools/benchmarks/loss.py, run as a user runs it, at sizes that take no time."""

import json

from tests.support.processes import tool


def test_each_way_is_right_and_has_a_time(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--device", "cpu", "--tokens", "64", "--hidden", "16", "--vocabulary", "100", "--repeats", "2"]
    done = tool("benchmarks/loss", *sizes, "--json", out)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    for name in ("fused", "fused, without a mask", "Megatron's", "torch's"):
        assert 0 < rows[name]["error"] < 1e-5 and len(rows[name]["times_ms"]) == 2, name
        assert name in done.stdout
    assert "error" not in rows["products alone"] and rows["products alone"]["median_ms"] > 0
    assert rows["fused"]["ratio"] == 1


def test_a_search_needs_a_gpu():
    done = tool("benchmarks/loss", "--device", "cpu", "--search")
    assert done.returncode == 2 and "--search is of CUDA kernels" in done.stderr
