"""Run pretrain_hybrid.py on all nodes of a SLURM job or on this machine, and restart it when a rank fails.

    tools/launch.py slurm [launcher's flags] -- pretrain_hybrid.py's flags        (in a batch step)
    tools/launch.py local --nproc 2 -- --recipe demo --save runs/demo ...

docs/cluster.md has more; --help lists the launcher's flags.
"""

import signal
import sys

from megatron_hybrid.cli import tool
from megatron_hybrid.launch import jobs


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # each program has its own answer
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = jobs.parser().parse_args(words[:at])
    sys.exit(getattr(jobs, args.where)(args, words[at + 1 :]))


if __name__ == "__main__":
    tool.run(main)
