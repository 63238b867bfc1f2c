"""The training run that all jobs of this suite do, and what is compared of it."""

import json
from pathlib import Path

from tests.slurm.cluster import Cluster, Job

NODES = 2
"""Of one process each."""
ITERATIONS = 48
SAVE_INTERVAL = 10
DROPOUT = 0.1
"""So that a random state that is not restored shows."""


def flags(data: Path, iterations: int = ITERATIONS, dropout: float = DROPOUT) -> list[str]:
    """A small mixture-of-experts hybrid, of some tenths of a second an iteration."""
    return f"""--recipe demo --expert-model-parallel-size 1 --data-path {data} --split 100,0,0 --eval-iters 0
    --tokenizer-type NullTokenizer --vocab-size 100 --train-iters {iterations} --lr-decay-iters {ITERATIONS}
    --lr-wsd-decay-iters 10 --seq-length 256 --micro-batch-size 2 --global-batch-size 8 --hidden-dropout {dropout}
    --save-interval {SAVE_INTERVAL} --log-interval 1 --device cpu --data-cache-path {data.parent}/cache""".split()


def submit(cluster: Cluster, data: Path, run: Path, words: list[str], *options: str, nodes: int = NODES) -> Job:
    """Submits the training script for this run. ``words`` are flags of training, ``options`` those of sbatch."""
    size = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", "--oversubscribe"]
    variables = {
        "RECIPE": "demo",
        "DATA_PREFIX": str(data),
        "TOKENIZER_TYPE": "NullTokenizer",
        "TOKENIZER": "none",
        "RUN_DIR": str(run),
        "OMP_NUM_THREADS": "1",
    }
    return Job.submit(cluster, "examples/slurm/pretrain.sbatch", run / "logs", [*size, *options], words, **variables)


def records(run: Path) -> list[dict]:
    """All whole lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(run: Path) -> dict[int, tuple[float, float, float]]:
    """Iteration to loss, gradient norm and learning rate: the last record of each."""
    return {r["iteration"]: (r["loss"], r["grad_norm"], r["learning_rate"]) for r in records(run) if "loss" in r}


def iteration(run: Path) -> int:
    """The last iteration that is done."""
    return max(steps(run), default=0)
