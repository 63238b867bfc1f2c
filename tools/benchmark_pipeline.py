#!/usr/bin/env python3
"""Step time of a run whose pipeline stages have equal work against equal numbers of layers.

    python tools/benchmark_pipeline.py
    python tools/benchmark_pipeline.py --recipe paper-1b-intra --train-iters 30 --stages 4

trains the same model from the same command line, but for the pipeline's boundaries, as separate runs of Megatron's own
loop: one with as many layers on each stage, one with --balance-pipeline. The runs take turns. Without flags for a model
it takes a small one with clustered attention and a large vocabulary.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from summarize_run import read_records

from megatron_hybrid.data import cli

ROOT = Path(__file__).resolve().parent.parent
SMALL = """--hybrid-layer-pattern M-M-M-M-*-*-*-*- --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 6
--group-query-attention --num-query-groups 2 --mamba-num-heads 12 --mamba-head-dim 32 --mamba-state-dim 32
--mamba-num-groups 1 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
--attention-dropout 0 --hidden-dropout 0 --vocab-size 8192 --seq-length 512 --max-position-embeddings 512
--micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --use-distributed-optimizer --train-iters 14"""
ALWAYS = """--tokenizer-type NullTokenizer --mock-data --log-interval 1 --eval-interval 100000 --eval-iters 0
--save-interval 100000 --no-save-optim --no-save-rng --ckpt-format torch_dist"""
WARM_UP = 4
"""Steps of each run that are not timed."""


def main() -> None:
    options, rest = parser().parse_known_args()
    argv = rest or SMALL.split()
    from megatron_hybrid import costs
    from megatron_hybrid.plan import subject

    balanced = subject.read([*argv, "--balance-pipeline", str(options.stages)], options.stages, options.device)
    equal = costs.equal_count(balanced.pattern, options.stages)
    patterns = {"equal layers": str(equal), "equal work": str(balanced.pattern)}
    expected = predicted(balanced, equal)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['environment'].items())}")
    for name, text in patterns.items():
        print(f"{name:12}  {text}")
    times: dict[str, list[list[float]]] = {name: [] for name in patterns}
    for turn in range(options.rounds):
        for name in list(patterns)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(train(argv, patterns[name], options))
            print(f"round {turn + 1}, {name}: {statistics.median(times[name][-1]):.3f} s a step", flush=True)
    report |= summary(times) | {"patterns": patterns, "expected_ratio": expected}
    print(f"\n{'':12}  {'median s':>9}  {'5% to 95%':>16}")
    for name in patterns:
        row = report["runs"][name]
        print(f"{name:12}  {row['median']:9.3f}  {row['low']:7.3f} to {row['high']:.3f}")
    low, high = min(report["ratios"]), max(report["ratios"])
    print(
        f"equal work / equal layers: {report['ratio']:.3f} of the time (each round {low:.3f} to {high:.3f}); "
        f"by the count of FLOPs {expected:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--stages", type=int, default=2, help="pipeline stages, each a process")
    made.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--json", type=Path, help="write the report here too")
    return made


def predicted(balanced: Any, equal: Any) -> float:
    """The ratio of step times that the count of FLOPs expects."""
    from megatron_hybrid.costs import stage_work
    from megatron_hybrid.costs.schedule import pipeline_time

    def time(pattern: Any) -> float:
        work = stage_work(pattern, balanced.sizes, balanced.layout.pp)
        return pipeline_time(work, [2 * w for w in work], balanced.layout.micro_batches)

    return time(balanced.pattern) / time(equal)


def train(argv: list[str], pattern: str, options: argparse.Namespace) -> list[float]:
    """Seconds of each timed step of one run.

    Raises:
        ValueError: The run fails, or is too short; with the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(options.stages), str(ROOT / "pretrain_hybrid.py"), *argv, *ALWAYS.split()]
        command += ["--device", options.device, "--save", folder, f"--hybrid-layer-pattern={pattern}"]
        command += ["--pipeline-model-parallel-size", str(options.stages)]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.stages))}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            output = done.stdout + done.stderr
            said = [line for line in output.splitlines() if line.startswith("error: ")]
            raise ValueError(f"the run with {pattern} failed:\n{said[0] if said else output[-3000:]}")
        found = [r["seconds"] for r in read_records(Path(folder) / "metrics.jsonl") if r.get("seconds")]
    if len(found) <= WARM_UP:
        raise ValueError(f"the run has {len(found)} timed steps, and {WARM_UP} warm it up: raise --train-iters.")
    return found[WARM_UP:]


def summary(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    runs = {}
    for name, turns in times.items():
        every = sorted(t for turn in turns for t in turn)
        runs[name] = {
            "median": statistics.median(every),
            "low": every[len(every) // 20],
            "high": every[-1 - len(every) // 20],
            "seconds": turns,
        }
    equal, work = times.values()
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(equal, work, strict=True)]
    return {"runs": runs, "ratios": ratios, "ratio": statistics.median(ratios)}


def environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "megatron-core")},
        "cores": str(os.cpu_count()),
    }


if __name__ == "__main__":
    cli.run(main)
