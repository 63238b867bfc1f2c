"""tools/plan.py as a user starts it. Each start that needs Megatron costs seconds: what it says is in test_plan.py."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.cli import tool
from tools import plan

ROOT = Path(__file__).parents[2]
PAPER = [f"paper-1b-{name}" for name in ("llama", "swa", "mamba", "inter", "intra")]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--compare" in done.stdout and done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    code = "import sys; sys.argv.append('--help');\ntry:\n    from tools import plan; plan.main()"
    code += "\nexcept SystemExit:\n    print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "megatron_hybrid.cli.tool" in loaded
    assert {"torch", "megatron", "rich", "matplotlib"}.isdisjoint(loaded)


def test_a_plan_with_times_and_a_picture(tmp_path):
    line = "--recipe paper-1b-intra --gpus 16 --gpu h100-80gb --pipeline-model-parallel-size 2 --balance-pipeline 4"
    done = run(*line.split(), "--plot", str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr
    assert "16 GPUs: tensor 1, pipeline 2, context 1, expert 1, data 8 x 2 segments" in done.stdout
    assert re.search(r"^MFU +\d+\.\d%$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 160
    assert "plot written to" in done.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# In this process: what main() raises, run() prints as one paragraph -----------------------------------


def ended(words, monkeypatch, capsys):
    """Exit code, standard output and standard error of a command line."""
    monkeypatch.setattr(sys, "argv", ["tools/plan.py", *words])
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)  # this process keeps its own
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
    try:
        tool.run(plan.main)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_layouts_as_json_are_flags_to_paste(monkeypatch, capsys):
    line = "--recipe demo --vocab-size 100 --gpus 4 --gpu a100-40gb"
    done = run(*line.split(), "--fit", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = found["proposals"][0]
    code, out, _ = ended([*line.split(), *best["flags"], "--json"], monkeypatch, capsys)
    planned = json.loads(out)
    assert code == 0
    assert planned["time"]["step"] == best["time"]["step"]
    assert max(row["total"] for row in planned["memory"]) == best["memory"]["total"] <= found["limit"]


def test_the_papers_tokens_of_equal_flops(monkeypatch, capsys):
    """Bae et al., arXiv:2510.04800, table 2."""
    code, out, _ = ended(["--compare", *PAPER, "--match", "flops", "--json"], monkeypatch, capsys)
    assert code == 0
    assert [round(row["tokens"] / 1e9) for row in json.loads(out)["architectures"]] == [60, 71, 73, 73, 72]


def test_a_gpu_of_ones_own(monkeypatch, capsys):
    figures = ["--peak-tflops", "100", "--memory-gib", "64", "--memory-bandwidth", "1000", "--nvlink-gbps", "800"]
    words = ["--recipe", "paper-1b-intra", "--gpus", "2", "--gpu", "ours", "--json"]
    code, out, _ = ended([*words, *figures], monkeypatch, capsys)
    time = json.loads(out)["time"]
    assert code == 0 and (time["gpu"], time["peak_flops"]) == ("ours", 1e14)
    code, out, err = ended([*words, *figures[:4]], monkeypatch, capsys)
    assert (code, out) == (2, "") and "'ours' is not a known GPU" in err
    assert err.rstrip().endswith("A plan also needs --memory-bandwidth --nvlink-gbps.")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--gpu h1000", "'h1000' is not a known GPU; known are a100-40gb"),
        ("--match flops", "--match makes architectures comparable: give them with --compare"),
        ("--fit", "--fit needs --gpus N and --gpu NAME"),
        ("--fit --gpu h100", "--fit needs --gpus N and --gpu NAME"),
        ("--fit --gpu h100 --gpus 0", "--gpus 0: give at least 1"),
        ("--fit --compare paper-1b-llama paper-1b-swa", "ask for one at a time"),
        ("--gpus -8", "--gpus -8: give at least 1"),
        ("--hiden-size 8", "unrecognized arguments: --hiden-size 8. Did you mean --hidden-size"),
        ("--compare paper-1b-llama paper-1b-itra", "did you mean paper-1b-intra"),
        ("--efficiency 0.5", "--efficiency is of a GPU: name it with --gpu"),
        ("--gpu h100 --efficiency 0", "--efficiency 0 is a share"),
        ("--gpu h100 --efficiency 3", "--efficiency 3 is a share"),
        ("--gpu h100 --efficiency -1", "--efficiency -1 is a share"),
        ("--gpu h100 --gpus-per-node 0", "--gpus-per-node must be a number above 0"),
        ("--gpu h100 --network-gbps 0", "--network-gbps must be a number above 0"),
        ("--gpu h100 --peak-tflops 0", "--peak-tflops must be a number above 0"),
        ("--gpu h100 --memory-gib -1", "--memory-gib must be a number above 0"),
        ("--plot plan.txt", "plan.txt must end in .png, .svg or .pdf"),
    ],
)
def test_a_mistake_is_one_paragraph(line, text, monkeypatch, capsys):
    code, out, err = ended(["--recipe", "paper-1b-intra", *line.split()], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert text in err and "Traceback" not in err and "\n\n" not in err
    assert not Path("plan.txt").exists()


def test_a_mistake_ends_the_process_without_a_trace():
    done = run("--recipe", "paper-1b-intra", "--gpus", "3", "--tensor-model-parallel-size", "2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: 3 processes do not divide into model replicas")
    assert "Traceback" not in done.stderr
