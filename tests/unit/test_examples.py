"""The scripts in examples/: what they would start, how they answer a mistake, and how the Slurm job ends.

torchrun, srun, scontrol and scancel are small programs of the tests' own here, first on the PATH: what is tested is
the scripts. The requeue test starts the real torchrun under them.
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

from megatron_hybrid import flags, recipes
from megatron_hybrid.costs import Sizes, model_parameters
from megatron_hybrid.intra_design import PRESETS
from megatron_hybrid.pattern import parse

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
TRAINING = ("pretrain_1b_intra.sh", "pretrain_moe.sh", "slurm/pretrain.sbatch")
NEEDED = {"DATA_PREFIX": "data/text", "TOKENIZER": "data/a tokenizer.model", "RUN_DIR": "runs"}
JOB = {"SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
JOB |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}

# srun's own options all have the form --name=value or stand alone, in our script
SRUN = 'printf "%s\\n" "$@" >"$RECORDS/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"'
STUBS = {
    "torchrun": 'printf "%s\\n" "$@" >"$RECORDS/torchrun"',
    "srun": SRUN,
    "scontrol": 'echo "$@" >>"$RECORDS/scontrol"; [[ $1 != show ]] || printf "n1\\nn2\\n"',
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
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return {"PATH": path, "RECORDS": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path), **JOB}


def run(script: str, *words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", str(EXAMPLES / script), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def launched(script: str, *words: str, cwd: Path, env: dict[str, str]) -> list[str]:
    """What the script gave torchrun."""
    done = run(script, *words, cwd=cwd, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return (cwd / "torchrun").read_text().splitlines()


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """torchrun's flags, and those after the program."""
    at = next(i for i, word in enumerate(argv) if word.endswith("pretrain_hybrid.py"))
    return argv[:at], argv[at + 1 :]


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
    assert not (tmp_path / "torchrun").exists()


def test_the_batch_script_outside_a_job_is_one_line(environment, tmp_path):
    plain = {k: v for k, v in environment.items() if not k.startswith("SLURM_")}
    done = run("slurm/pretrain.sbatch", cwd=tmp_path, env={**plain, **NEEDED})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "SLURM_JOB_ID is not set" in done.stderr


def test_megatron_takes_the_flags_of_every_example(environment, tmp_path):
    """Torchrun's own parser and --print-config, with each example's number of processes, in one process."""
    from torch.distributed.run import parse_args

    processes = {"pretrain_1b_intra.sh": 8, "pretrain_moe.sh": 8, "slurm/pretrain.sbatch": 16, "laptop_parallel.sh": 4}
    lines = {}
    for script, count in processes.items():
        argv = launched(script, "--seed", "7", cwd=tmp_path, env={**environment, **NEEDED})
        launcher, program = parse_args(argv), split(argv)[1]
        assert int(launcher.nproc_per_node) * int(launcher.nnodes.split(":")[-1]) == count
        assert program[-2:] == ["--seed", "7"]
        assert launcher.training_script_args == program
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
        "16 processes: tensor 1, pipeline 1, context 1, expert 1, data 16",
        "4 processes: tensor 2, pipeline 2, context 1, expert 2, data 1",
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
    stub(tmp_path / "bin", "python", f'exec {shlex.quote(sys.executable)} "$@"')
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
        counts.append(model_parameters(parse(args.hybrid_layer_pattern), Sizes.from_args(args)).non_embedding)
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
    launcher, program = split(launched("slurm/pretrain.sbatch", cwd=tmp_path, env={**environment, **NEEDED}))
    given = dict(zip(launcher, launcher[1:], strict=False))
    assert given["--rdzv-endpoint"] == "n1:24321"
    assert (given["--nnodes"], given["--nproc_per_node"], given["--rdzv-id"]) == ("2", "8", "54321")
    assert given["--rdzv-conf"] == "is_host=0"  # this is the second node
    assert "--exit-signal-handler" in program
    step = (tmp_path / "srun").read_text().splitlines()
    assert "--output=runs/logs/54321-%N.log" in step and "--cpus-per-task=96" in step
    assert (tmp_path / "runs/logs").is_dir()
    # a run that ends by itself is not queued again
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames n[1-2]"]


# Stands for training: it is told by SIGTERM, takes a moment to save, and ends well.
RANK = """
import os, pathlib, signal, sys, time
records = pathlib.Path(os.environ["RECORDS"])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(records / f"ready{os.environ['RANK']}").touch()
while not told:
    time.sleep(0.05)
time.sleep(1)
(records / f"saved{os.environ['RANK']}").touch()
sys.exit(int(os.environ["ENDS_WITH"]))
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_near_its_limit_saves_and_is_queued_again(status, environment, tmp_path):
    (tmp_path / "pretrain_hybrid.py").write_text(RANK)
    real = f'echo $$ >"$RECORDS/launcher"; exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"'
    stub(tmp_path / "bin", "torchrun", real)
    stub(tmp_path / "bin", "srun", f'echo $$ >"$RECORDS/task"; {SRUN}')
    # a Slurm that signals all processes of a step; with cgroups it is the task alone
    stub(tmp_path / "bin", "scancel", f'{STUBS["scancel"]}; kill -TERM $(cat "$RECORDS/launcher" "$RECORDS/task")')
    one_node = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "2", "ENDS_WITH": str(status)}
    stub(tmp_path / "bin", "scontrol", STUBS["scontrol"].replace("n1\\nn2", "127.0.0.1"))
    job_id = str(os.getpid() * 2 + status)  # the port follows from it
    env = {**environment, **NEEDED, **one_node, "SLURM_JOB_ID": job_id, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(EXAMPLES / "slurm/pretrain.sbatch")]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ready = [tmp_path / "ready0", tmp_path / "ready1"]
        deadline = time.monotonic() + 200
        while not all(path.exists() for path in ready) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        _, said = job.communicate(timeout=200)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "saved0").exists(), said
    assert (tmp_path / "saved1").exists() or status  # torchrun ends the second when the first has failed
    assert "SignalException" not in said
    assert (job.returncode == 0) == (status == 0), said
    assert (tmp_path / "scancel").read_text().split() == ["--signal=TERM", f"{job_id}.0"]
    requeued = f"requeue {job_id}" in (tmp_path / "scontrol").read_text()
    assert requeued == (status == 0), "a run that fails must not start over and over"
