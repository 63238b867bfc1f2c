"""Runs of pretrain_hybrid.py on one GPU, all at the same time: each start takes longer than its few steps."""

from collections.abc import Mapping
from pathlib import Path

from megatron_hybrid.benchmarks.loss_comparison import run

EVERY_SYMBOL = "M-*-W-P-MEGE"
FLAGS = """--device cuda --bf16 --hidden-size 256 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 512 --seq-length 256 --max-position-embeddings 256 --vocab-size 511 --swiglu --disable-bias-linear
--normalization RMSNorm --position-embedding-type rope --swa-window 100 --swa-sinks 16 --mamba-head-dim 64
--mamba-num-heads 6 --mamba-num-groups 1 --mamba-state-dim 64 --intra-num-attention-heads 4 --intra-num-query-groups 2
--intra-qk-dim 128 --intra-value-dim 256 --intra-ssm-dim 320 --intra-ssm-head-dim 64 --linear-num-key-heads 2
--linear-num-value-heads 2 --linear-key-head-dim 64 --linear-value-head-dim 64 --hidden-dropout 0
--attention-dropout 0 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 128
--moe-shared-expert-intermediate-size 128 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
--moe-router-load-balancing-type none --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
--micro-batch-size 4 --global-batch-size 8 --train-iters 20 --lr 3e-4 --min-lr 3e-4 --lr-decay-style constant
--weight-decay 0.1 --clip-grad 1.0 --tokenizer-type NullTokenizer --mock-data --seed 7 --log-interval 1
--eval-interval 100000 --eval-iters 0 --ckpt-format torch_dist --save-interval 10"""
"""A model of all symbols in which the input projections of M, P and G have rows that are no multiple of 16."""


def losses(folder: Path, arms: Mapping[str, str], limit_s: float = 500) -> dict[str, list[float]]:
    """Losses of the 20 steps of each run, or of those after the checkpoint that it loads.

    Args:
        arms: Name to flags beside ``FLAGS``; what it saves is in the folder of that name.
    """
    common = [*FLAGS.split(), "--hybrid-layer-pattern", EVERY_SYMBOL]
    return run({name: [*common, *flags.split()] for name, flags in arms.items()}, folder, limit_s)
