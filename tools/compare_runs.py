"""Compare training runs: a table of what they are and where their losses ended, and a plot of the losses.

    python tools/compare_runs.py runs/a runs/b --plot losses.png
    python tools/compare_runs.py runs/design_space/*/ --by intra-preset

reads metrics.jsonl and run.json of each run's directory. With --by, runs with the same value of that flag, such as
those of several seeds, are one row: means, and for the losses the range in brackets.
"""

import argparse
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder.compare_runs import TRAIN_STEPS, draw, read_groups, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the --save directories of the runs")
    parser.add_argument("--by", metavar="FLAG", help="one row for each value of this flag, such as intra-preset")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the losses there")
    args = parser.parse_args()
    groups = read_groups(args.runs, args.by)
    print(table(groups, args.by or "run"))
    print(
        f"\nparameters: without embeddings; train loss: mean of the last {TRAIN_STEPS} steps; losses in nats per token"
    )
    if args.plot:
        draw(groups, args.plot)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    tool.run(main)
