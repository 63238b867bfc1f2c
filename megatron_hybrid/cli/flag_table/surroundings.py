"""What is around the model and the run: layout, data, tokenizer, and Megatron's other programs."""

from megatron_hybrid.cli.flag_table.rows import Row, idle, no, ours, untried, yes

FAMILIES: dict[str, list[Row]] = {
    "Layout and communication": [
        yes(
            "",
            """--tensor-model-parallel-size --sequence-parallel --pipeline-model-parallel-size --context-parallel-size
            --expert-model-parallel-size --expert-tensor-parallel-size""",
        ),
        ours("write | into the pattern", "--num-virtual-stages-per-pipeline-rank"),
        no(
            "write | into the pattern where the stages start, or give --balance-pipeline",
            """--num-layers-per-virtual-pipeline-stage --pipeline-model-parallel-layout
            --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
            --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers""",
        ),
        ours("W and P, and * of --backend torch, gather keys and values", "--cp-comm-type"),
        untried("Transformer Engine", "--hierarchical-context-parallel-sizes"),
        no("samples are split over all context-parallel ranks alike", "--hybrid-context-parallel"),
        idle("it belongs to --hybrid-context-parallel", "--max-seqlen-per-dp-cp-rank"),
        untried(
            "Transformer Engine 2.19; refused under --backend torch",
            "--tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards",
        ),
        untried(
            "Transformer Engine; refused under --backend torch",
            """--tp-comm-overlap --tp-comm-overlap-cfg --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad
            --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag
            --no-tp-comm-split-rs --tp-comm-bootstrap-backend""",
        ),
        yes(
            "",
            """--overlap-grad-reduce --overlap-param-gather --ddp-num-buckets --ddp-bucket-size
            --ddp-pad-buckets-for-high-nccl-busbw --ddp-reduce-scatter-with-fp32-accumulation
            --ddp-param-name-patterns-for-fp32-local-accumulation --ddp-average-in-collective --no-align-param-gather
            --no-align-grad-reduce --num-distributed-optimizer-instances --no-overlap-p2p-communication
            --overlap-p2p-communication-warmup-flush --microbatch-group-size-per-virtual-pipeline-stage
            --use-tp-pp-dp-mapping --disable-gloo-process-groups --distributed-timeout-minutes
            --distributed-timeout-seconds-after-init --local-rank""",
        ),
        ours("gloo on the CPU engine", "--distributed-backend"),
        untried(
            "NCCL on GPUs",
            """--use-sharp --sharp-enabled-group --high-priority-stream-groups --nccl-communicator-config-path
            --use-nccl-ub --disable-symmetric-registration --create-all-gather-group
            --pipeline-model-parallel-comm-backend --flight-recorder-dump-path --flight-recorder-trace-buffer-size
            --no-flight-recorder-dump-on-timeout --flight-recorder-include-stack-trace
            --no-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec""",
        ),
        untried(
            "they need fused gradient accumulation and therefore te",
            "--defer-embedding-wgrad-compute --wgrad-deferral-limit --overlap-param-gather-with-optimizer-step",
        ),
        no("torch has no ring exchange", "--use-ring-exchange-p2p"),
        no("the model needs its process groups when it is built", "--lazy-mpu-init"),
        yes("collectives do nothing: for profiling only, losses are wrong", "--fake-process-group"),
        no(
            "parameters that ranks of a hybrid layer share, and checkpoints with a manifest, need Megatron's DDP",
            "--use-megatron-fsdp --use-torch-fsdp2",
        ),
        idle(
            "it belongs to FSDP",
            """--torch-fsdp2-no-reshard-after-forward --data-parallel-sharding-strategy --outer-dp-sharding-strategy
            --no-gradient-reduce-div-fusion --fsdp-double-buffer --suggested-communication-unit-size
            --enable-full-sharding-in-hsdp --fsdp-manual-registration --megatron-fsdp-main-params-dtype
            --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
            --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
            --fsdp-db-use-persist-buf-on-alloc-fail""",
        ),
    ],
    "Data": [
        yes(
            "",
            """--data-path --split --train-data-path --valid-data-path --test-data-path --data-args-path
            --per-split-data-args-path --data-cache-path --no-mmap-bin-files --mock-data --num-workers
            --reset-attention-mask --eod-mask-loss --num-dataset-builder-threads --mid-level-dataset-surplus
            --allow-ambiguous-pad-tokens --dataloader-type""",
        ),
        yes("with --reset-attention-mask, where it changes nothing", "--reset-position-ids"),
        untried(
            "",
            """--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --object-storage-cache-path --enable-msc
            --disable-msc""",
        ),
        idle("masks are never made", "--no-create-attention-mask-in-dataloader"),
        no(
            "document boundaries are found by the end-of-document token. Use --reset-attention-mask",
            "--dataloader-inter-document-masking",
        ),
        no(
            "the data sets do not support fill-in-the-middle",
            """--fim-data --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate --fim-no-prefix
            --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token --fim-eod-token""",
        ),
        no("the lengths are read from the index", "--per-dataset-sequences-path"),
    ],
    "Tokenizer": [
        yes(
            "",
            """--vocab-size --padded-vocab-size --no-pad-vocab-size --tokenizer-type --tokenizer-model
            --tiktoken-pattern --tiktoken-num-special-tokens --null-tokenizer-eod-id --null-tokenizer-pad-id""",
        ),
        untried(
            "as in Megatron's tokenizers",
            """--vocab-file --merge-file --tokenizer-metadata --tokenizer-special-tokens --tokenizer-hf-no-use-fast
            --tokenizer-hf-no-include-special-tokens --trust-remote-code --tokenizer-sentencepiece-legacy
            --no-tokenizer-sentencepiece-ignore-extra-whitespaces""",
        ),
    ],
    "Other programs of Megatron's": [
        idle(
            "it belongs to inference",
            """--inference-batch-times-seqlen-threshold --max-tokens-to-oom --use-legacy-static-engine
            --inference-max-requests --inference-max-seq-length --inference-dynamic-batching
            --inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-paused-buffer-size-gb
            --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-block-size
            --inference-dynamic-batching-max-requests --inference-dynamic-batching-max-tokens
            --inference-dynamic-batching-num-cuda-graphs --inference-dynamic-batching-track-paused-request-events
            --inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs
            --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens
            --inference-dynamic-batching-unified-memory-level --enable-chunked-prefill --num-speculative-tokens
            --inference-dynamic-batching-prefix-caching --inference-dynamic-batching-prefix-caching-eviction-policy
            --inference-dynamic-batching-prefix-caching-coordinator-policy
            --inference-dynamic-batching-prefix-caching-routing-alpha
            --inference-dynamic-batching-prefix-caching-mamba-gb
            --inference-dynamic-batching-cuda-graph-mixed-prefill-count
            --inference-dynamic-batching-cuda-graph-sizing-distribution --inference-dynamic-batching-sampling-backend
            --use-same-sampling-seed-across-dp-ranks --inference-dynamic-batching-async-sched-mode
            --inference-dynamic-batching-logprobs-mode --inference-logging-step-interval
            --inference-text-gen-server-logging --inference-wandb-logging --inference-coordinator-port
            --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype
            --inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus --inference-shards
            --inference-cuda-graph-scope --flash-decode --symmetric-ar-type --nccl-all-reduce-for-prefill
            --inference-fuse-tp-communication --inference-disable-triton-nvls-kernels
            --inference-grouped-gemm-backend --inference-moe-disable-fused-quant-kernels
            --inference-moe-token-dispatcher-type --mlp-chunks-for-prefill
            --moe-pad-experts-for-cuda-graph-inference""",
        ),
        no("it belongs to reinforcement learning", "--perform-rl-step"),
        idle(
            "it belongs to reinforcement learning",
            """--rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size --rl-generation-lag
            --rl-submission-granularity --rl-consumption-granularity --grpo-iterations --grpo-clamp-eps-lower
            --grpo-clamp-eps-upper --grpo-kl-beta --grpo-entropy-term-weight --grpo-filter-groups-with-same-reward
            --langrl-env-config --rl-default-temperature --rl-default-top-p --rl-default-top-k
            --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode --rl-persist-cuda-graphs
            --rl-partial-rollouts --rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef
            --rl-use-sequence-packing --rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo
            --rl-training-cuda-graphs --rl-inference-tensor-model-parallel-size
            --rl-inference-pipeline-model-parallel-size --rl-inference-expert-model-parallel-size
            --rl-inference-expert-tensor-model-parallel-size --rl-inference-model-unified-memory-level
            --rl-offload-inference-model-weights-when-idle --refit-method --rl-verify-model-weights-swap
            --rl-skip-bos-token --rl-profile --rl-profile-dir --rl-inference-parsers""",
        ),
        no("data sets for fine-tuning are not supported yet", "--sft"),
        idle("they belong to fine-tuning", "--sft-tokenizer-prompt-format --chat-template"),
        no("it belongs to vision models", "--vision-pretraining"),
        idle(
            "it belongs to vision models",
            """--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction
            --no-data-sharding --head-lr-mult --vision-pretraining-type --vision-backbone-type --swin-backbone-type
            --mask-type --mask-factor --iter-per-epoch --dino-local-img-size --dino-local-crops-number
            --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer --dino-norm-last-layer
            --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs""",
        ),
        idle(
            "they belong to BERT, T5 and retrieval models",
            """--ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load --bert-load
            --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
            --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path --embedding-path
            --indexer-batch-size --indexer-log-interval --bert-no-binary-head --output-bert-embeddings
            --bert-embedder-type --sample-rate --mask-prob --short-seq-prob --vocab-extra-ids""",
        ),
        no(
            "distillation from stored logits is only in Megatron's own script",
            """--logits-load-dir --logits-load-decode-threads --logits-load-prefetch-factor
            --logits-load-msc-prefetch-depth --logits-load-kd-loss-alpha --logits-load-ignore-errors""",
        ),
        no("upcycling of dense models is not supported", "--moe-use-upcycling --moe-upcycling-granularity"),
        no("settings come from flags and recipes", "--yaml-cfg"),
    ],
}
