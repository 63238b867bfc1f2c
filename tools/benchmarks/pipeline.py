#!/usr/bin/env python3
"""Step time of a run whose pipeline stages have equal work against equal numbers of layers.

    python tools/benchmarks/pipeline.py
    python tools/benchmarks/pipeline.py --recipe paper-1b-intra --train-iters 30 --stages 4

trains the same model from the same command line, but for the pipeline's boundaries, as separate runs of Megatron's own
loop: one with as many layers on each stage, one with --balance-pipeline. The runs take turns. Without flags for a model
it takes a small unbalanced one: mixers first, then wide FFNs and the output head.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_hybrid.benchmarks.short_runs import environment, timed, train
from megatron_hybrid.cli import tool

SMALL = """--hybrid-layer-pattern MM**---- --hidden-size 192 --ffn-hidden-size 4096 --num-attention-heads 6
--group-query-attention --num-query-groups 2 --mamba-num-heads 12 --mamba-head-dim 32 --mamba-state-dim 32
--mamba-num-groups 1 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
--attention-dropout 0 --hidden-dropout 0 --vocab-size 1024 --seq-length 512 --max-position-embeddings 512
--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --use-distributed-optimizer --train-iters 14"""


def main() -> None:
    options, rest = parser().parse_known_args()
    argv = rest or SMALL.split()
    from megatron_hybrid import costs
    from megatron_hybrid.plan import subject

    balanced = subject.read([*argv, "--balance-pipeline", str(options.stages)], options.stages, options.device)
    equal = costs.equal_count(balanced.pattern, options.stages)
    patterns = {"equal layers": str(equal), "equal work": str(balanced.pattern)}
    expected = predicted(balanced, equal)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment(options.device)}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['environment'].items())}")
    for name, text in patterns.items():
        print(f"{name:12}  {text}")
    times: dict[str, list[list[float]]] = {name: [] for name in patterns}
    for turn in range(options.rounds):
        for name in list(patterns)[:: 1 if turn % 2 == 0 else -1]:
            flags = [f"--hybrid-layer-pattern={patterns[name]}", "--pipeline-model-parallel-size", str(options.stages)]
            times[name].append(timed(train([*argv, *flags], options.stages, options.device)))
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
    made = tool.parser(__doc__)
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


if __name__ == "__main__":
    tool.run(main)
