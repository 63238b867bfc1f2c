#!/usr/bin/env bash
# A cluster's parallel run on a laptop without a GPU: 4 processes, tensor 2 (with sequence parallelism) x pipeline 2.
# Needs only `make setup`; uses mock data. Takes a minute or two and leaves no files.
#   examples/laptop_parallel.sh [FLAGS]
set -euo pipefail

PATTERN='M-P-|MEW-'  # | separates the two pipeline stages
PATH=$PATH:$(dirname "$0")/../.venv/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The two ranks of a stage also divide its experts and share the one group of B and C.
torchrun --standalone --nproc_per_node 4 "$(dirname "$0")/../pretrain_hybrid.py" --recipe demo --device cpu \
    --hybrid-layer-pattern "$PATTERN" --pipeline-model-parallel-size 2 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 \
    --train-iters 20 --log-interval 5 --eval-interval 20 --eval-iters 1 "$@"
