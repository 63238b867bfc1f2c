"""What the preprocessing benchmark measures and makes; its speeds are for its reports."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tools.benchmarks import preprocess as benchmark

SOURCES = str(Path(asyncio.__file__).parent)


def test_a_contestant_is_measured_with_its_children(tmp_path):
    child = "x = bytearray(80_000_000); import time; time.sleep(0.3)"
    code = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {child!r}])
end = time.process_time() + 0.2
while time.process_time() < end: pass
worker.wait()
print("1,234,567 tokens, 5.50 MB/s once at work; first documents after 0.25 s")
"""
    found = benchmark.measure([sys.executable, "-c", code], 2_000_000)
    assert found["steady MB/s"] == 5.5 and found["first s"] == 0.25
    assert found["wall s"] > 0.3 and found["MB/s"] == pytest.approx(2 / found["wall s"])
    assert found["M tokens/s"] == pytest.approx(1.234567 / found["wall s"])
    assert 80 < found["peak MB"] < 200 and found["CPU s"] >= 0.2
    with pytest.raises(ValueError, match="failed"):
        benchmark.measure([sys.executable, "-c", "raise SystemExit(3)"], 1)


def test_the_table_has_ratios_to_megatrons_way(capsys):
    run = {
        "wall s": 10.0,
        "MB/s": 1.0,
        "steady MB/s": 2.0,
        "M tokens/s": 1.0,
        "CPU s": 9.0,
        "peak MB": 5.0,
        "first s": 0.0,
    }
    fast = run | {"wall s": 2.0, "steady MB/s": 30.0, "first s": 0.5}
    runs = {"Megatron's way": [run] * 3, "this tool": [fast, fast | {"wall s": 4.0}, fast], "bare tokenizer": [fast]}
    medians = benchmark.table(runs)
    assert medians["this tool"]["wall s"] == 2.0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("this tool  "))
    assert row[3] == "2.00-4.00" and row[-2:] == ["0.200", "15.00"]


def test_the_corpus_has_no_repeats_and_the_size_that_was_asked_for(tmp_path):
    path = benchmark.make_corpus(tmp_path / "a.jsonl", 300_000, (SOURCES,))
    texts = [json.loads(line)["text"] for line in path.open()]
    assert len(set(texts)) == len(texts) > 60 and 300_000 <= path.stat().st_size < 310_000
    again = benchmark.make_corpus(tmp_path / "b.jsonl", 300_000, (SOURCES,))
    assert again.read_bytes() == path.read_bytes()
    words = " ".join(benchmark.random_words(100_000)).split()
    assert len(set(words)) > 0.99 * len(words)
