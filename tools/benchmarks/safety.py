#!/usr/bin/env python3
"""Cost of metrics and checkpoints: time per iteration, as a ratio to a run without them.

    python tools/benchmarks/safety.py
    python tools/benchmarks/safety.py --every 50 --processes 8 --device cuda -- \\
        --recipe paper-1b-intra --train-iters 160

trains the same model in turns: bare, with metrics.jsonl, also with sealed checkpoints in the foreground,
and with checkpoints in the background. Time is that of the clock from the end of the warm-up to the end of
the last iteration, with all saves between; every kind of run does the same iterations. Without flags for a model it
takes a small one.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_hybrid.benchmarks.short_runs import WARM_UP, environment, launch
from megatron_hybrid.cli import tool

SMALL = """--recipe demo --expert-model-parallel-size 1 --vocab-size 4096 --micro-batch-size 2 --global-batch-size 8
--seq-length 256 --train-iters 64 --lr-decay-iters 64 --lr-wsd-decay-iters 10"""
ALWAYS = "--tokenizer-type NullTokenizer --mock-data --log-interval 10 --eval-interval 100000 --eval-iters 0"
KINDS = ("bare", "metrics", "checkpoints", "background")


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--one-run":
        return one_run(json.loads(sys.argv[2]), sys.argv[3:])
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options, argv = parser().parse_args(words[:at]), words[at + 1 :] or SMALL.split()
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment(options.device)}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['environment'].items())}")
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.rounds):
        for kind in KINDS[:: 1 if turn % 2 == 0 else -1]:
            times[kind].append(seconds_per_iteration(kind, argv, options))
            print(f"round {turn + 1}, {kind}: {times[kind][-1]:.4f} s per iteration", flush=True)
    report |= {"every": options.every, "seconds_per_iteration": times, "ratios": ratios(times)}
    print(f"\n{'':12}  {'median s':>9}  {'range':>18}  ratio to bare in the same round")
    for kind, found in times.items():
        of = report["ratios"][kind]
        spread = f"{min(found):.4f} to {max(found):.4f}"
        print(f"{kind:12}  {statistics.median(found):9.4f}  {spread:>18}  {statistics.median(of):.3f} ", end="")
        print(f"({min(of):.3f} to {max(of):.3f})")
    print(f"a checkpoint of {options.size / 1e6:,.1f} MB every {options.every} iterations")
    if options.json:
        options.json.write_text(json.dumps(report | {"checkpoint_bytes": options.size}, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    made = tool.parser(__doc__)
    made.add_argument("--every", type=int, default=10, metavar="N", help="iterations between saves (default: 10)")
    made.add_argument("--processes", type=int, default=2, metavar="N", help="of a run (default: 2)")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each kind (default: 3)")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    return made


def seconds_per_iteration(kind: str, argv: list[str], options: argparse.Namespace) -> float:
    """Mean over the iterations behind the warm-up of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = folder / "run"
        flags = [*argv, *ALWAYS.split(), "--device", options.device]
        if kind != "bare":
            flags += ["--save", str(run), "--keep-last", "2"]
        # of upstream's rule the last iteration is saved at the end, which is outside of what is timed
        flags += ["--save-interval", str(options.every if kind in ("checkpoints", "background") else 1_000_000)]
        flags += ["--async-save"] if kind == "background" else []
        what = json.dumps({"bare": kind == "bare", "times": str(folder / "times.json")})
        launch([__file__, "--one-run", what, *flags], options.processes, folder)
        if kind == "checkpoints":
            from megatron_hybrid.run_folder.checkpoints import checkpoints, size

            options.size = size(checkpoints(run)[0].folder)
        done = json.loads((folder / "times.json").read_text())
    if len(done) <= WARM_UP + options.every:
        raise ValueError(f"a run has {len(done)} iterations: --train-iters must be above {WARM_UP + options.every}.")
    return (done[-1] - done[WARM_UP - 1]) / (len(done) - WARM_UP)


def one_run(what: dict[str, Any], argv: list[str]) -> None:
    """In a rank: trains, and notes when each iteration has ended, its save included."""
    import pretrain_hybrid
    from megatron_hybrid.training import metrics

    write = metrics.write_metrics
    ends: list[float] = []

    def hooked(*args: Any, **kwargs: Any) -> dict[str, Any]:
        from megatron.training import training

        decide = training.checkpoint_and_decide_exit

        def decided(*args: Any, **kwargs: Any) -> Any:
            result = decide(*args, **kwargs)
            ends.append(time.perf_counter())
            return result

        training.checkpoint_and_decide_exit = decided
        return {} if what["bare"] else write(*args, **kwargs)

    metrics.write_metrics = hooked
    pretrain_hybrid.main(argv)
    import torch

    if torch.distributed.get_rank() == 0:
        Path(what["times"]).write_text(json.dumps(ends))


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {kind: [a / b for a, b in zip(found, times["bare"], strict=True)] for kind, found in times.items()}


if __name__ == "__main__":
    tool.run(main)
