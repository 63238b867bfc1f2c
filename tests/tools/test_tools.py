"""The command-line tools, run as a user runs them, and the quickstart around a stand-in training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hybrid.cli import quickstart
from megatron_hybrid.run_folder import training_summary
from megatron_hybrid.run_folder.metrics_file import Metrics, read_metrics
from megatron_hybrid.run_folder.run_info import read_run_info

ROOT = Path(__file__).resolve().parents[2]

TRAINING = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[1])
(run / "run.json").write_text(json.dumps({"args": {"train_iters": 3}}))
with (run / "metrics.jsonl").open("a") as stream:
    for i in (1, 2, 3):
        record = {"iteration": i, "loss": 4.0 - i, "tokens": 64 * i, "tokens_per_second": 5000.0 + i}
        stream.write(json.dumps(record) + "\\n")
print("training says hello")
"""
"""A program with the files of a training: what is tested is what the quickstart does around it."""


def tool(name, *arguments, **environment):
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def corpus(tmp_path):
    """A corpus of real text: the documents of one package of the standard library."""
    source = Path(json.__file__).parent
    done = tool("build_stdlib_corpus", "--source", source, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "corpus.jsonl"


def test_from_sources_to_data_set(corpus, tmp_path):
    count = len(corpus.read_text().splitlines())
    model = tmp_path / "tok.model"
    done = tool("train_tokenizer", "--input", corpus, "--vocab-size", 400, "--output", model)
    assert done.returncode == 0 and "400 ids" in done.stdout, done.stderr
    arguments = ["--input", corpus, "--tokenizer-model", model, "--output-prefix", tmp_path / "v1.0"]
    done = tool("preprocess_data", *arguments, "--append-eod", "--workers", 1)
    assert done.returncode == 0 and f"{count} documents" in done.stdout, done.stderr
    assert (tmp_path / "v1.0_text_document.bin").exists() and (tmp_path / "v1.0_text_document.idx").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("build_stdlib_corpus", "--source {tmp}/none --output {tmp}", "contains no Python sources"),
        ("train_tokenizer", "--input {tmp}/none --vocab-size 300 --output {tmp}/m", "none does not exist"),
        ("train_tokenizer", "--input {tmp} --vocab-size 300 --output {tmp}/m.model", "vocabulary of 300"),
        ("train_tokenizer", "--input {tmp}/*.jsonl --vocab-size 9999 --output {tmp}/m", "vocabulary of 9999"),
        (
            "preprocess_data",
            "--input {tmp} --tokenizer-model {tmp}/m.model --output-prefix {tmp}/o",
            "m.model does not exist",
        ),
        ("preprocess_data", "--input {tmp} --output-prefix {tmp}/o", "no tokenizer: give --tokenizer-model"),
        ("summarize_run", "{tmp}", "metrics.jsonl does not exist"),
        ("compare_runs", "{tmp}", "metrics.jsonl has no training record"),
        ("launch", "slurm -- --recipe demo --save {tmp}/r", "SLURM_JOB_ID is not set"),
        ("launch", "local -- --recipe demo", "--save is not given"),
        ("launch", "local --nproc 3 -- --recipe demo --save {tmp}/r", "3 ranks, and expert 2"),
    ],
)
def test_user_errors_are_one_paragraph(tmp_path, name, arguments, message):
    (tmp_path / "a.jsonl").write_text('{"text": "little text"}\n')
    done = tool(name, *arguments.format(tmp=tmp_path).split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# --- summary ---------------------------------------------------------------------------------------


def write_run(run_dir):
    """A run that was interrupted after iteration 3 with a half-written line, and resumed from 2."""
    run_dir.mkdir(parents=True)
    train = [(1, 8.0), (2, 6.0), (3, 99.0), None, (3, 4.0), (4, 2.5)]
    lines = []
    for entry in train:
        if entry is None:
            lines.append('{"iteration": 4, "lo')
            continue
        iteration, loss = entry
        record = {"iteration": iteration, "loss": loss, "tokens": 1000 * iteration, "tokens_per_second": None}
        lines.append(json.dumps(record | ({"tokens_per_second": 100.0 * iteration} if iteration > 1 else {})))
    lines.insert(2, json.dumps({"iteration": 2, "validation_loss": 6.5, "validation": "validation"}))
    lines.append(json.dumps({"iteration": 4, "validation_loss": 3.25, "validation": "validation"}))
    lines.append(json.dumps({"iteration": 4, "validation_loss": 77.0, "validation": "test"}))
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    info = {"recipe": "demo", "pattern": "M-P-*-ME", "parameters_total": 1234567, "parameters_active": 765432}
    (run_dir / "run.json").write_text(json.dumps(info | {"device": "cpu", "processes": 2}))
    (run_dir / "latest_checkpointed_iteration.txt").write_text("4")


def test_summary_of_a_resumed_run(tmp_path):
    run_dir = tmp_path / "run"
    write_run(run_dir)
    done = tool("summarize_run", run_dir)
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines() if "  " in line.strip())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["pattern"] == "M-P-*-ME"
    assert rows["parameters"] == "1,234,567 in all, 765,432 active"
    assert rows["tokens seen"] == "4,000"
    assert rows["train loss"] == "8.000 (iteration 1) -> 2.500 (iteration 4)"
    assert rows["validation loss"] == "6.500 (iteration 2) -> 3.250 (iteration 4)"
    assert rows["tokens per second"] == "300"  # the median of 200, 300, 400
    assert rows["processes"] == "2 on cpu"
    assert rows["checkpoint"] == str(run_dir / "iter_0000004")
    assert "--print-config" in done.stdout and "pretrain.sbatch" in done.stdout
    assert (run_dir / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_summary_of_throughput_and_memory():
    """Medians as of tokens per second; MFU against the last peak only; what the records lack is left out."""
    base = {"loss": 1.0, "tokens": 64, "tokens_per_second": 8.0}
    rates = [(1, None, None, 900.0), (2, 300.0, 0.3, 1000.0), (3, 200.0, 0.2, 1000.0), (4, 100.0, 0.9, 111.0)]
    records = [
        {**base, "iteration": i, "tflops_per_gpu": t, "mfu": m, "peak_tflops": p, "peak_name": "H100 SXM, bf16 dense"}
        for i, t, m, p in (rates[0], rates[3], *rates[1:3])
    ]
    records[2]["peak_memory_bytes"] = 3 * 2**30
    records[3]["peak_memory_bytes"] = 61.25 * 2**30

    def rows(records, device):
        metrics = Metrics({i: r for i, r in enumerate(records)}, {})
        text = training_summary.summary(Path("run"), metrics, {"device": device, "processes": 8})
        return {line[2:20].strip(): line[20:].strip() for line in text.splitlines()}

    found = rows(records, "cuda")
    assert found["TFLOP/s per GPU"] == "200.0, MFU 25.0% of 1000 (H100 SXM, bf16 dense)"
    assert found["peak memory"] == "61.2 GiB of a GPU"
    found = rows([{**base, "iteration": 1, "tflops_per_gpu": 0.01234, "peak_resident_bytes": 2**30}], "cpu")
    assert found["TFLOP/s per rank"] == "0.0123"
    assert found["peak memory"] == "1.0 GiB of a process"
    assert not {"TFLOP/s per GPU", "TFLOP/s per rank", "peak memory"} & set(rows([{**base, "iteration": 1}], "cuda"))


def test_summary_without_run_json_or_validation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\nnoise\n[1]\n{"loss": 1}\n')
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    text = training_summary.summary(tmp_path, metrics, read_run_info(tmp_path))
    assert [line.split()[0] for line in text.splitlines()] == ["iterations", "train"]


# --- comparison ------------------------------------------------------------------------------------


def write_short_run(run_dir, seed, validation_loss):
    run_dir.mkdir()
    records = [{"iteration": i, "loss": 5.0 - i, "tokens": 64 * i, "tokens_per_second": 10.0 * i} for i in (1, 2, 3)]
    records.append({"iteration": 3, "validation_loss": validation_loss, "validation": "validation"})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    info = {"parameters_total": 1500, "parameters_embedding": 300, "args": {"intra_preset": "hymba", "seed": seed}}
    (run_dir / "run.json").write_text(json.dumps(info))


def test_runs_with_one_value_of_a_flag_are_one_row(tmp_path):
    for seed, loss in ((1, 3.25), (2, 3.75)):
        write_short_run(tmp_path / f"seed{seed}", seed, loss)
    write_run(tmp_path / "other")  # no flags, no parameters of embeddings
    runs = [tmp_path / "seed1", tmp_path / "seed2"]
    done = tool("compare_runs", *runs, "--by", "intra-preset", "--plot", tmp_path / "losses.png")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()[:3]]
    assert rows[0] == ["intra-preset", "runs", "parameters", "tokens", "train loss", "validation loss", "tokens/s"]
    ranges = ["3.000 (3.000 to 3.000)", "3.500 (3.250 to 3.750)"]  # 3 is the mean of 4, 3, 2
    assert rows[2] == ["hymba", "2", "1,200", "192", *ranges, "20"]
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"

    by_name = tool("compare_runs", runs[0], tmp_path / "other").stdout.splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (by_name[0], *by_name[2:4])] == [
        ["run", "parameters", "tokens", "train loss", "validation loss", "tokens/s"],
        ["seed1", "1,200", "192", "3.000", "3.250", "20"],
        ["other", "", "4,000", "5.125", "3.250", "300"],  # the mean of 8, 6, 4, 2.5
    ]
    refused = tool("compare_runs", tmp_path / "other", "--by", "seed")
    assert refused.returncode == 2 and "--by seed" in refused.stderr and refused.stderr.count("\n") == 1


# --- quickstart ------------------------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path):
    return quickstart.Quickstart(tmp_path / "work", None, ROOT)


def stand_in(steps, code=TRAINING):
    return [sys.executable, "-c", code, str(steps.run_dir)]


def test_steps_are_skipped_and_follow_a_rebuilt_one(steps, monkeypatch, capsys):
    calls = []

    def make(path, name):
        calls.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    index = steps.data_prefix.with_name("corpus_text_document.idx")
    monkeypatch.setattr(steps, "build_corpus", lambda: make(steps.corpus, "corpus"))
    monkeypatch.setattr(steps, "train_tokenizer", lambda: make(steps.tokenizer, "tokenizer"))
    monkeypatch.setattr(steps, "preprocess", lambda: make(index, "preprocess"))
    monkeypatch.setattr(steps, "pretrain_command", lambda: stand_in(steps))
    steps.run()
    assert calls == ["corpus", "tokenizer", "preprocess"]
    assert "iteration 3/3  loss 1.000  5,003 tokens/s" in capsys.readouterr().out

    calls.clear()
    steps.rebuilt = False
    steps.run()
    assert calls == []
    out = capsys.readouterr().out
    assert [f"[{name}] done before" in out for name in ("corpus", "tokenizer", "preprocess", "pretrain")] == [True] * 4
    assert len((steps.run_dir / "metrics.jsonl").read_text().splitlines()) == 3, "not trained again"

    steps.tokenizer.unlink()
    steps.run()
    assert calls == ["tokenizer", "preprocess"]
    old = [path for path in steps.run_dir.parent.iterdir() if path.name.startswith("run.")]
    assert len(old) == 1 and (old[0] / "metrics.jsonl").exists(), "the run on the old ids is set aside"
    assert len((steps.run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_failed_training_shows_the_cause(steps, capsys):
    steps.run_dir.mkdir(parents=True)
    code = (
        "print('a' * 50, flush=True); print('ValueError: the cause')\n"
        "print('E1123 15:26:04 9818 torch/distributed/elastic/multiprocessing/api.py:986] failed')\n"
        "print('noise\\n' * 100); raise SystemExit(3)"
    )
    with pytest.raises(quickstart.StepFailed, match="exit code 3"):
        steps.pretrain(stand_in(steps, code))
    err = capsys.readouterr().err
    assert "ValueError: the cause" in err and "noise" not in err
    assert not steps.done.exists()


def test_interrupt_ends_the_training_and_a_second_start_continues(steps, tmp_path):
    child = tmp_path / "child.pid"
    code = f"""
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r} + ".tmp", "w").write(str(rank.pid)); os.rename({str(child)!r} + ".tmp", {str(child)!r})
time.sleep(600)
"""
    program = (
        "import signal, sys; from pathlib import Path; from megatron_hybrid.cli import quickstart\n"
        # a test run in the background inherits an ignored SIGINT
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"steps = quickstart.Quickstart(Path({str(steps.run_dir.parent)!r}), None, Path())\n"
        f"steps.pretrain([sys.executable, '-c', {code!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "run the same command again" in out
    rank = Path(f"/proc/{child.read_text()}/stat")
    # Gone, or a zombie that waits for its new parent to collect it.
    assert not rank.exists() or rank.read_text().split()[2] == "Z"
    assert not steps.done.exists()


def test_training_command_is_what_the_user_is_told(steps):
    command = quickstart.Quickstart(steps.run_dir.parent, 7, ROOT).pretrain_command()
    pairs = dict(zip(command, command[1:], strict=False))
    assert pairs["--save"] == pairs["--load"] == str(steps.run_dir)
    assert pairs["--nproc_per_node"] == "2" and pairs["--recipe"] == "demo" and pairs["--device"] == "cpu"
    assert pairs["--train-iters"] == "7" and "--train-iters" not in steps.pretrain_command()
