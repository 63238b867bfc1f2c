"""The scripts in examples/: what they would start, how they answer a mistake, and how the Slurm job ends.

torchrun, srun, scontrol and scancel are small programs of the tests' own here, first on the PATH: what is tested is
the scripts, and the launcher under those of Slurm. tests/slurm has the real one.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_hybrid.cli import flags, recipes
from megatron_hybrid.costs import model_parameters, sizes_of
from megatron_hybrid.layers.intra.design import PRESETS
from megatron_hybrid.pattern import parse

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
BATCH = ("slurm/pretrain.sbatch", "slurm/pretrain_moe.sbatch")
TRAINING = ("pretrain_1b_intra.sh", "pretrain_moe.sh", *BATCH)
NEEDED = {"DATA_PREFIX": "data/text", "TOKENIZER": "data/a tokenizer.model", "RUN_DIR": "runs"}
JOB = {"SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "no-such-node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
JOB |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "96(x2)"}

STUBS = {
    "torchrun": 'printf "%s\\n" "$@" >"$RECORDS/torchrun"',
    "srun": 'printf "%s\\n" "$@" >"$RECORDS/srun"',
    "scontrol": 'echo "$@" >>"$RECORDS/scontrol"; [[ $1 != show ]] || echo "JobState=RUNNING NodeAddr=127.0.0.1"',
    "python": f'exec {shlex.quote(sys.executable)} "$@"',
    "scancel": 'echo "$@" >>"$RECORDS/scancel"',
}


def stub(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path):
    """The stubs first on the PATH, a Slurm job's variables, and where the stubs write what they were given."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub(tmp_path / "bin", name, body)
    for name in ("tools", "examples"):  # what the scripts want where the job was submitted
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return {"PATH": path, "RECORDS": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path), **JOB}


def run(script: str, *words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", str(EXAMPLES / script), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def launched(script: str, *words: str, cwd: Path, env: dict[str, str]) -> list[str]:
    """What the script, or the launcher that it calls, gave torchrun or srun."""
    done = run(script, *words, cwd=cwd, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return (cwd / ("srun" if script in BATCH else "torchrun")).read_text().splitlines()


def split(argv: list[str]) -> tuple[int, list[str]]:
    """Number of processes, and the flags after the program."""
    if "--" in argv:
        given = dict(zip(argv, argv[1:], strict=False))
        return int(given["--nodes"]) * int(given["--nproc"]), argv[argv.index("--") + 1 :]
    from torch.distributed.run import parse_args

    launcher = parse_args(argv)
    assert launcher.training_script.endswith("pretrain_hybrid.py")
    return int(launcher.nproc_per_node) * int(launcher.nnodes.split(":")[-1]), launcher.training_script_args


def test_each_script_is_valid_short_and_says_how_to_call_it():
    others = {"laptop_parallel.sh", "design_space.sh", "slurm/preprocess_array.sbatch"}
    assert {str(s.relative_to(EXAMPLES)) for s in SCRIPTS} == {*TRAINING, *others}
    for script in SCRIPTS:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
        assert all(line.startswith("# ") for line in lines[1:4]) and str(script.relative_to(ROOT)) in lines[3]
        assert len(lines) < 80 and max(map(len, lines)) <= 120
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_variable_is_one_line(script, missing, environment, tmp_path):
    given = {name: value for name, value in NEEDED.items() if name != missing}
    done = run(script, cwd=tmp_path, env={**environment, **given})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and f"{missing} is not set" in done.stderr
    assert not (tmp_path / "torchrun").exists() and not (tmp_path / "srun").exists()


def test_the_batch_script_outside_a_job_is_one_line(environment, tmp_path):
    plain = {k: v for k, v in environment.items() if not k.startswith("SLURM_")}
    done = run("slurm/pretrain.sbatch", cwd=tmp_path, env={**plain, **NEEDED})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "SLURM_JOB_ID is not set" in done.stderr


def test_megatron_takes_the_flags_of_every_example(environment, tmp_path):
    """The launchers' own parsers and --print-config, with each example's number of processes, in one process."""
    processes = {"pretrain_1b_intra.sh": 8, "pretrain_moe.sh": 8, "laptop_parallel.sh": 4, **dict.fromkeys(BATCH, 16)}
    lines = {}
    for script, count in processes.items():
        started, program = split(launched(script, "--seed", "7", cwd=tmp_path, env={**environment, **NEEDED}))
        assert started == count
        assert program[program.index("--seed") + 1] == "7"
        lines[script] = program
        resolved = flags.resolve(program)
        if script != "laptop_parallel.sh":
            assert program[program.index("--tokenizer-model") + 1] == NEEDED["TOKENIZER"]  # it has a space
            assert program[program.index("--save") + 1] == program[program.index("--load") + 1] == "runs"
            assert "--save-interval" in resolved.argv

    code = """if True:
        import json, os, sys
        import pretrain_hybrid
        for count, argv in json.loads(sys.argv[1]):
            os.environ["WORLD_SIZE"] = str(count)
            pretrain_hybrid.main([*argv, "--print-config", "--device", "cpu"])
    """
    wanted = json.dumps([(processes[script], argv) for script, argv in lines.items()])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, wanted],
        cwd=ROOT,
        env={**os.environ, **rank},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    layouts = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("layout")]
    assert layouts == [
        "8 processes: tensor 1, pipeline 1, context 1, expert 1, data 8",
        "8 processes: tensor 1, pipeline 1, context 1, expert 8, data 8",
        "4 processes: tensor 2, pipeline 2, context 1, expert 2, data 1",
        "16 processes: tensor 1, pipeline 1, context 1, expert 1, data 16",
        "16 processes: tensor 1, pipeline 1, context 1, expert 8, data 16",
    ]


# Stands for training: it leaves what a run of the flags that it was given leaves, and its flags.
RUN = """
import json, os, pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
save, step = pathlib.Path(given["--save"]), int(given["--train-iters"])
args = {"intra_preset": given["--intra-preset"], "seed": int(given["--seed"])}
(save / "run.json").write_text(json.dumps({"args": args}))
(save / "metrics.jsonl").write_text(json.dumps({"iteration": step, "loss": 2.0, "tokens": 64}) + "\\n")
with open(os.environ["RECORDS"] + "/runs", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(int(given["--seed"]) == 13)
"""


@pytest.fixture
def design_space(environment, tmp_path):
    """Runs the script where the data are made; what it said, and the program's flags of each run that it started."""
    stub(tmp_path / "bin", "torchrun", f'exec {shlex.quote(sys.executable)} -c {shlex.quote(RUN)} "$@"')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus_text_document.idx").touch()
    own = {"DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out"), "ITERATIONS": "2"}

    def start(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        (tmp_path / "runs").write_text("")
        done = run("design_space.sh", *words, cwd=tmp_path, env={**environment, **own, **variables})
        return done, [split(json.loads(line))[1] for line in (tmp_path / "runs").read_text().splitlines()]

    return start


def test_designs_are_compared_at_equal_parameters(design_space):
    done, started = design_space()
    assert (done.returncode, done.stderr) == (0, "")
    designs, counts = [], []
    for program in started:
        assert program[:2] == ["--recipe", "demo"]
        argv = recipes.merge(recipes.recipe("demo").flags, program[2:])
        # a flag without a value has the next flag here, which is as true as True
        given = {flag: word for flag, word in zip(argv, argv[1:], strict=False) if flag.startswith("--")}
        assert "--disable-bias-linear" in given
        args = Namespace(**{flag[2:].replace("-", "_"): int(w) if w.isdigit() else w for flag, w in given.items()})
        args.add_bias_linear, args.vocab_size = False, 4096
        counts.append(model_parameters(parse(args.hybrid_layer_pattern), sizes_of(args)).non_embedding)
        designs.append(given)
    assert [given["--intra-preset"] for given in designs] == list(PRESETS)
    assert max(counts) / min(counts) < 1.01 and 0.5e6 < min(counts) < 1.5e6
    own = {f"--intra-{name}" for name in ("preset", "qk-dim", "value-dim", "ssm-dim", "ssm-head-dim")}
    shared = [{f: w for f, w in given.items() if f not in own | {"--save", "--load"}} for given in designs]
    assert all(flags == shared[0] for flags in shared), "the runs differ in more than their P layers"


def test_a_comparison_goes_on_where_it_stopped(design_space, tmp_path):
    done, started = design_space(SEEDS="1 13")
    assert done.returncode == 1 and "training failed" in done.stderr
    assert len(started) == 6, "five runs, and the first of the seed that fails"
    done, started = design_space(SEEDS="1")
    assert (done.returncode, started) == (0, [])
    assert done.stdout.count("done before") == 5
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == list(PRESETS)
    assert "noise" in done.stdout and (tmp_path / "out/design_space.png").stat().st_size > 1000
    done, started = design_space("--lr", "1e-3", SEEDS="1")
    assert (done.returncode, started) == (2, []) and "other flags" in done.stderr


def test_the_job_meets_on_the_first_node(environment, tmp_path):
    words = launched("slurm/pretrain.sbatch", cwd=tmp_path, env={**environment, **NEEDED, "LAUNCH": "--grace 77"})
    step, node = words[: words.index("node")], dict(zip(words, words[1:], strict=False))
    assert "--kill-on-bad-exit=1" in step and "--cpus-per-task=96" in step and "--ntasks-per-node=1" in step
    assert node["--master-addr"] == "127.0.0.1" and 24321 <= int(node["--master-port"]) < 24421
    assert (node["--nodes"], node["--nproc"], node["--job"], node["--grace"]) == ("2", "8", "54321", "77.0")
    assert "--exit-signal-handler" in words
    assert node["--logs"] == "runs/logs/54321" and (tmp_path / "runs/logs/54321").is_dir()
    # a run that ends by itself is not queued again
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show node no-such-node1"]


# Stands for training: it is told by SIGTERM, takes a moment to save, says so and ends.
RANK = """
import json, os, pathlib, signal, sys, time
records = pathlib.Path(os.environ["RECORDS"])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(records / f"ready{os.environ['RANK']}").touch()
while not told:
    time.sleep(0.05)
time.sleep(1)
(records / f"saved{os.environ['RANK']}").touch()
if os.environ["RANK"] == "0":
    state = {"status": "stopped", "reason": os.environ["ENDS_FOR"]}
    (records / "runs/state.json").write_text(json.dumps(state))
"""


@pytest.mark.parametrize("reason", ["signal", "flag"])
def test_a_job_near_its_limit_saves_and_is_queued_again(reason, environment, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    step = 'while [[ $1 == --* ]]; do shift; done; echo $$ >"$RECORDS/step"; exec "$@"'
    stub(tmp_path / "bin", "srun", step)
    stub(tmp_path / "bin", "scancel", f'{STUBS["scancel"]}; kill -TERM $(cat "$RECORDS/step")')
    job_id = str(os.getpid())
    env = {**environment, **NEEDED, "SLURM_JOB_NODELIST": "localhost", "ENDS_FOR": reason, "SLURM_JOB_ID": job_id}
    env |= {"SLURM_GPUS_ON_NODE": "", "LAUNCH": "--nproc 2 --program rank.py", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(EXAMPLES / "slurm/pretrain.sbatch"), "--device", "cpu"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        ready = [tmp_path / "ready0", tmp_path / "ready1"]
        deadline = time.monotonic() + 300
        while not all(path.exists() for path in ready) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=300)
    finally:
        if job.poll() is None:
            job.kill()
            os.kill(int((tmp_path / "step").read_text()), signal.SIGKILL)
    assert job.returncode == 0, said
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists(), said
    told = (tmp_path / "scancel").read_text().split()  # again and again, where the step takes its time
    assert told and told == ["--signal=TERM", job_id] * (len(told) // 2)
    requeued = (tmp_path / "scontrol").exists() and f"requeue {job_id}" in (tmp_path / "scontrol").read_text()
    assert requeued == (reason == "signal"), said
    assert ("requeued" in said) == requeued and "SIGTERM on " in said
