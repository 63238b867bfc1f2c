#!/usr/bin/env bash
# Pretrains the paper's 1B intra-layer hybrid with 8 experts per layer on one node: one expert of each layer per GPU.
# Needs 8 GPUs (requirements-gpu.txt) and tokenized text (tools/preprocess_data.py); a second call resumes.
#   DATA_PREFIX=data/web_text_document TOKENIZER=data/web.model RUN_DIR=runs/moe examples/pretrain_moe.sh [FLAGS]
set -euo pipefail

DATA_PREFIX=${DATA_PREFIX:-}  # a .bin/.idx pair, without the extension
TOKENIZER=${TOKENIZER:-}      # its tokenizer: a SentencePiece file, or what TOKENIZER_TYPE takes
TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer} # HuggingFaceTokenizer takes a name or a folder
RUN_DIR=${RUN_DIR:-}          # checkpoints, metrics.jsonl and run.json
GPUS=${GPUS:-8}               # a multiple of EXPERT_PARALLEL: the rest is data parallel
EXPERT_PARALLEL=${EXPERT_PARALLEL:-8} # divides the 8 experts

for name in DATA_PREFIX TOKENIZER RUN_DIR; do
    [[ -n ${!name} ]] || { echo "$0: $name is not set; see the first lines of this script" >&2; exit 2; }
done
PATH=$PATH:$(dirname "$0")/../.venv/bin

torchrun --standalone --nproc_per_node "$GPUS" "$(dirname "$0")/../pretrain_hybrid.py" --recipe paper-1b-intra-moe \
    --expert-model-parallel-size "$EXPERT_PARALLEL" \
    --data-path "$DATA_PREFIX" --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER" \
    --save "$RUN_DIR" --load "$RUN_DIR" "$@"
