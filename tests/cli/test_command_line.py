"""The program as a user starts it: what is quick, what it prints, how it ends, and a first run without torchrun.

Each start imports Megatron and costs seconds: what does not need one of its own runs in a rank, which has imported it
already, as the mistakes do that Megatron's parser finds (test_refused_flags.py).
"""

import json
import os
import re
import resource
import subprocess
import sys

import numpy
import pytest

from megatron_hybrid.cli.recipes import recipes
from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from megatron_hybrid.run_folder.state import read_state
from tests.data.corpora import random_tokens
from tests.support.processes import BOUND_S, ROOT
from tests.support.program import program, train

PROGRAM = str(ROOT / "pretrain_hybrid.py")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """A process with these arguments after python's name; none of torchrun's variables are left over."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
    )


def processor_seconds(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess, float]:
    """The same, with the processor time that it took: another program's load does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*words, **environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_package_imports_neither_torch_nor_megatron():
    modules = "config, flags, recipes, report"
    imports = f"from megatron_hybrid.cli import {modules}; from megatron_hybrid import costs, pattern"
    code = f"import sys, json; {imports}; print(json.dumps(sorted(sys.modules)))"
    done, seconds = processor_seconds("-c", code)
    loaded = json.loads(done.stdout)
    assert "megatron_hybrid.cli.report" in loaded
    assert [name for name in loaded if name.split(".")[0] in ("torch", "megatron", "numpy", "transformers")] == []
    assert seconds < 1


def test_recipes_are_listed_at_once():
    done, seconds = processor_seconds(PROGRAM, "--list-recipes")
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == [r.name for r in recipes()]
    assert seconds < 2


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "--hybrid-layer-pattern M-Q-",
            "error: 'Q' at position 3 is not a layer; use one of M * W P G - E\n    M-Q-\n",
        ),
        ("--recipe paper-1b-itra", "paper-1b-intra"),
        ("--hybrid-layer-pattern M-M-M- --pipeline-model-parallel-size 4", "do not divide over 4 pipeline stages"),
        ("--hybrid-layer-pattern M- --num-blocks 4", "drop one"),
        ("", "The run has no layers"),
    ],
)
def test_a_mistake_in_the_layers_ends_at_once(line, text):
    done, seconds = processor_seconds(PROGRAM, *line.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and text in done.stderr
    assert "\n\n" not in done.stderr
    assert seconds < 2


def test_torchrun_shows_a_mistake_once():
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(*launch, PROGRAM, "--hybrid-layer-pattern", "M-Q-")
    assert done.returncode != 0
    # the second rank gives way: torchrun would end the first, silent, if the second were to go before it
    assert done.stderr.count("error: 'Q' at position 3") == 1
    assert "error on rank" not in done.stderr
    # torchrun has a traceback of its own for any rank that fails; none is the program's
    assert 'pretrain_hybrid.py", line' not in done.stderr


def test_a_run_cuts_its_pipeline_by_cost(ranks):
    line = "--recipe paper-1b-intra --print-config --pipeline-model-parallel-size 2 --balance-pipeline"
    (code, out, errors), (refused, _, why) = (
        ranks(1).run(program, line=f"{line} {segments}", sizes=False)[0] for segments in (4, 3)
    )
    assert code == 0, errors
    # four segments for two stages; the last one is short, for it has the output head
    assert "--hybrid-layer-pattern=M-M-M-M-|P-M-M-M-|P-M-M-M-|M-" in out
    assert refused == 2
    assert why.startswith("error: 3 pipeline segments do not divide over 2 stages")


def test_an_unknown_flag_is_one_line(ranks):
    code, out, errors = ranks(1).run(program, line="--recipe demo --hiden-size 64", sizes=False)[0]
    assert code == 2
    assert out == ""
    assert errors.splitlines() == [
        "error: unrecognized arguments: --hiden-size 64. Did you mean --hidden-size, --ffn-hidden-size? See --help."
    ]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Three steps of a small demo in one process, started without torchrun, with a validation after the second."""
    where = tmp_path_factory.mktemp("run")
    flags = """--recipe demo --expert-model-parallel-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 100
    --train-iters 3 --lr-decay-iters 100 --seq-length 64 --micro-batch-size 2 --global-batch-size 4 --log-interval 1
    --eval-interval 2 --eval-iters 1 --save-interval 100 --device cpu --no-save-optim --data-cache-path"""
    return run(PROGRAM, *flags.split(), str(where / "cache"), "--save", str(where)), where


def test_one_process_trains_without_torchrun(first_run):
    done, where = first_run
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "recipe   demo (ours)" in lines
    assert "layers   M-M-P-ME*-ME" in lines
    assert "backend  torch on cpu" in lines
    assert "kernels  attention of *: torch; attention of P: torch, padded" in lines
    assert sum(line.startswith("device   CPU engine (asked for)") for line in lines) == 1
    assert (where / "latest_checkpointed_iteration.txt").read_text() == "3"
    told = json.loads((where / "run.json").read_text())
    assert told["pattern"] == "M-M-P-ME*-ME" and told["recipe"] == "demo"
    assert (told["backend"], told["ssm_kernels"]) == ("torch", "torch")
    assert "note     Mamba-2 kernels: plain PyTorch (--ssm-kernels torch)" in lines
    assert told["parameters_embedding"] == 128 * 128  # 100 tokens, padded to 128, by the hidden size
    state = read_state(where)
    assert (state.status, state.iteration, state.train_iters) == ("finished", 3, 3)


def test_a_run_can_be_watched(first_run):
    _, where = first_run
    done = run("tools/watch_run.py", str(where), COLUMNS="100", LINES="50")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{where.name}: finished | iteration 3 of 3 (100.0%) | tokens 768 | loss ")
    titles = ("loss (nats per token), x: validation", "gradient norm", "tokens per second", "busiest expert / mean")
    assert all(title in done.stdout for title in titles)
    assert re.search(r"^layer 8 .*\nlayer 12 .*\n\Z", done.stdout, re.M)


def test_metrics_hold_each_steps_own_loss(first_run):
    done, where = first_run
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["iteration"] for r in steps] == [1, 2, 3]
    assert [r["samples"] for r in steps] == [4, 8, 12]
    assert [r["tokens"] for r in steps] == [4 * 64, 8 * 64, 12 * 64]
    logged = [float(x) for x in re.findall(r"iteration +\d+/ +3 .*?lm loss: (\S+)", done.stdout + done.stderr)]
    first, second, third = (r["loss"] for r in steps)
    # the log shows seven digits; upstream's second line would average two steps
    assert logged == pytest.approx([first, second, third], rel=1e-6)
    assert abs(first - second) > 1e-4
    norms = [float(x) for x in re.findall(r"grad norm: (\S+)", done.stdout + done.stderr)]
    assert norms == pytest.approx([r["grad_norm"] for r in steps], abs=6e-4)  # three decimals
    rates = [float(x) for x in re.findall(r"learning rate: (\S+)", done.stdout + done.stderr)]
    assert rates == pytest.approx([r["learning_rate"] for r in steps], rel=1e-6)
    assert steps[0]["seconds"] is None and steps[1]["seconds"] > 0
    assert steps[1]["tokens_per_second"] == pytest.approx(4 * 64 / steps[1]["seconds"])
    assert steps[2]["seconds"] is None  # the validation stands between


def test_metrics_hold_each_validation(first_run):
    done, where = first_run
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    found = [(r["iteration"], r["validation"]) for r in records if "validation_loss" in r]
    assert found == [(2, "validation"), (3, "validation"), (3, "test")]
    values = [r["validation_loss"] for r in records if "validation_loss" in r]
    logged = re.findall(r"validation loss at .*?lm loss value: (\S+)", done.stdout + done.stderr)
    assert [float(x) for x in logged] == pytest.approx(values, rel=1e-6)


def test_a_restarted_program_goes_on_as_if_it_had_never_stopped(ranks, tmp_path):
    """Through pretrain() itself: the order of the data, the schedule, the random state, and the metrics file.

    The run that stops and goes on is two processes, with workers that read ahead; the other has none.
    """
    random_tokens(tmp_path, 100, "corpus_text_document")
    flags = f"""--recipe demo --expert-model-parallel-size 1 --data-path {tmp_path}/corpus_text_document
    --tokenizer-type NullTokenizer --vocab-size 100 --train-iters 6 --lr-wsd-decay-iters 2 --seq-length 64
    --micro-batch-size 2 --global-batch-size 4 --eval-interval 100 --eval-iters 1 --save-interval 3 --device cpu
    --hidden-dropout 0.1 --split 80,10,10 --data-cache-path {tmp_path}/cache""".split()

    def steps(where):
        records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        return [(r["iteration"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in records if "loss" in r]

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ranks(1).run(train, argv=[*flags, "--save", str(straight), "--num-workers", "0"])
    for more in (["--exit-interval", "3"], []):
        done = run(PROGRAM, *flags, "--save", str(stopped), "--load", str(stopped), *more)
        assert done.returncode == 0, done.stderr[-3000:]
        state = read_state(stopped)
        ended = (state.status, state.reason, state.iteration)
        assert ended == (("stopped", "flag", 3) if more else ("finished", "", 6))
    assert (read_state(straight).status, read_state(straight).iteration) == ("finished", 6)
    assert [iteration for iteration, *_ in steps(straight)] == [1, 2, 3, 4, 5, 6]
    assert steps(stopped) == steps(straight)


def test_a_blend_trains_on_its_sources_and_says_how_much_of_each(ranks, tmp_path):
    for name, length in (("web", 3000), ("code", 1000)):
        with IndexedWriter(tmp_path, name, dtype_for(100)) as writer:
            lengths = numpy.full(100, length // 100)
            writer.add(numpy.arange(length, dtype=numpy.uint16) % 99, lengths)
            writer.finish()
    (tmp_path / "blend.yaml").write_text(
        "sources: [{name: web, path: web, weight: 3}, {name: code, path: code, weight: 1, epochs: 2}]"
    )
    flags = f"""--recipe demo --expert-model-parallel-size 1 --data-blend {tmp_path}/blend.yaml --split 80,10,10
    --tokenizer-type NullTokenizer --vocab-size 100 --train-iters 2 --lr-decay-iters 100 --seq-length 64
    --micro-batch-size 2 --global-batch-size 4 --eval-interval 100 --eval-iters 1 --device cpu
    --data-cache-path {tmp_path}/cache --num-workers 0"""
    (out,) = ranks(1).run(train, argv=[*flags.split(), "--save", str(tmp_path / "run")])
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("data     source"))
    assert [line.split() for line in lines[at : at + 4]] == [
        ["data", "source", "weight", "available", "drawn", "epochs", "allowed"],
        ["web", "0.7500", "2,400", "384", "0.16", "any"],
        ["code", "0.2500", "800", "128", "0.16", "2"],
        ["all", "1.0000", "3,200", "512"],
    ]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["tokens"] for r in records if "loss" in r] == [256, 512]
