"""Summarize a training run: what was trained, how the loss went, what to try next.

    python tools/summarize_run.py runs/quickstart/run

reads metrics.jsonl and run.json of the run's directory and draws loss_curve.png there.
"""

import argparse
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder.metrics_file import read_metrics
from megatron_hybrid.run_folder.run_info import read_run_info
from megatron_hybrid.run_folder.training_summary import draw, places, summary

NEXT_STEPS = """\
Next (after `source .venv/bin/activate`):
  the full recipes      python pretrain_hybrid.py --list-recipes
  one of them in full   python pretrain_hybrid.py --recipe paper-1b-intra --print-config
  on CUDA GPUs          torchrun --nproc_per_node 8 pretrain_hybrid.py --recipe paper-1b-intra \\
                            --data-path PREFIX --tokenizer-type SentencePieceTokenizer \\
                            --tokenizer-model MODEL --save DIR --load DIR
  on a SLURM cluster    sbatch examples/slurm/pretrain.sbatch"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="the --save directory of the run")
    args = parser.parse_args()
    path = args.run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the --save directory of a run that has started to train.")
    metrics = read_metrics(path)
    if not metrics.train:
        raise ValueError(f"{path} has no training record yet; look again after some iterations.")
    info = read_run_info(args.run_dir)
    curve = args.run_dir / "loss_curve.png"
    draw(metrics, str(info.get("pattern") or args.run_dir.name), curve)
    print(summary(args.run_dir, metrics, info))
    print(places(args.run_dir, curve))
    print(NEXT_STEPS)


if __name__ == "__main__":
    tool.run(main)
