"""The model: its layers, experts and heads, their numbers and their recomputation."""

from megatron_hybrid.cli.flag_table.rows import Row, idle, no, ours, ruled_out, untried, yes

FAMILIES: dict[str, list[Row]] = {
    "Layers and sizes": [
        yes(
            "sizes of the model",
            """--hidden-size --num-attention-heads --group-query-attention --num-query-groups --kv-channels
            --ffn-hidden-size --seq-length --max-position-embeddings --make-vocab-size-divisible-by
            --untie-embeddings-and-output-weights --norm-epsilon""",
        ),
        yes(
            "M layers",
            "--mamba-state-dim --mamba-head-dim --mamba-num-groups --mamba-num-heads --disable-mamba-mem-eff-path",
        ),
        untried("with a mamba_ssm that has such an argument; else refused", "--mamba-training-ssm-states-dtype"),
        yes(
            "G layers",
            """--linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim --linear-num-key-heads
            --linear-num-value-heads""",
        ),
        yes(
            "the layers; `--hybrid-override-pattern` is its old name",
            "--hybrid-layer-pattern --hybrid-override-pattern",
        ),
        ours("the pattern decides; Megatron warns if they differ", "--num-layers --is-hybrid-model"),
        ours("upstream's hybrid stack is replaced by ours; others are refused", "--spec"),
        no(
            "G in the pattern says which layers are gated delta nets, and D layers are not supported",
            "--experimental-attention-variant --linear-attention-freq",
        ),
        no(
            "the pattern lists the layers",
            """--encoder-num-layers --decoder-num-layers --heterogeneous-layers-config-path
            --heterogeneous-layers-config-encoded-json --encoder-seq-length --decoder-seq-length""",
        ),
        no(
            "it belongs to D layers, which are not supported",
            """--dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk --dsa-indexer-topk-freq
            --dsa-indexer-skip-topk-offset --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss
            --dsa-kernel-backend --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
            --no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32""",
        ),
        no(
            "the symbols * and W are ordinary grouped-query attention",
            """--multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
            --rotary-scaling-factor --mscale --mscale-all-dim --cache-mla-latents --mla-down-proj-fusion""",
        ),
    ],
    "Attention, positions, activations": [
        yes("`--backend torch` ignores it: torch selects the kernel; `local` is refused", "--attention-backend"),
        yes("no windows on CUDA with dropout of attention weights", "--attention-dropout --hidden-dropout"),
        yes("E layers and P layers: none (see cli/checks.py)", "--disable-bias-linear --add-qkv-bias"),
        yes("* and W; not P", "--attention-output-gate"),
        yes("* and W", "--qk-l2-norm"),
        yes("scores and softmax are always fp32 under `--backend torch`", "--attention-softmax-in-fp32"),
        ours(
            "each attention layer has its own RoPE; rope or none",
            """--position-embedding-type --use-rotary-position-embeddings --rotary-base --rotary-percent
            --rotary-interleaved --use-rope-scaling --rope-scaling-factor --rope-type""",
        ),
        idle("--position-embedding-type decides", "--no-position-embedding"),
        no(
            "use --use-rope-scaling with --rope-scaling-factor",
            "--rotary-seq-len-interpolation-factor",
        ),
        no("--position-embedding-type none removes RoPE from all layers", "--no-rope-freq"),
        no(
            "the attention layers have RoPE or none",
            """--mrope-section --yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow
            --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int
            --relative-attention-num-buckets --relative-attention-max-distance""",
        ),
        no("sliding windows are W layers, with --swa-window", "--window-size --window-attn-skip-freq"),
        yes("only vanilla: sinks are W layers", "--softmax-type"),
        no("the attention layers do not normalise queries and keys", "--qk-layernorm"),
        no("the attention layers scale only by the head size", "--apply-query-key-layer-scaling"),
        no(
            "it needs statistics of the scores that the attention cores do not provide",
            "--qk-clip --qk-clip-alpha --qk-clip-threshold --log-max-attention-logit",
        ),
        no("it needs an NVIDIA package that is not public", "--use-kitchen-attention --kitchen-attention-backend"),
        untried("Transformer Engine", "--flash-attention-version"),
        yes(
            "activations of - and E layers",
            """--swiglu --squared-relu --quick-geglu --glu-linear-offset --activation-func-clamp-value
            --use-fused-weighted-squared-relu""",
        ),
        no("Megatron 0.19.2 accepts and ignores it", "--openai-gelu --apply-residual-connection-post-layernorm"),
        untried("Transformer Engine", "--use-te-activation-func --use-transformer-engine-op-fuser"),
        untried("Transformer Engine's layers", "--fused-residual-rmsnorm"),
        yes("only RMSNorm; `--apply-layernorm-1p` on te without P", "--normalization --apply-layernorm-1p"),
        yes("", "--mlp-chunks-for-training"),
        untried("Transformer Engine with FlashAttention", "--batch-invariant-mode"),
        yes(
            "backend torch has none of these fusions",
            """--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
            --no-rope-fusion --no-persist-layer-norm --disable-jit-fuser
            --cross-entropy-loss-fusion --cross-entropy-fusion-impl --no-clone-scatter-output-in-embedding""",
        ),
        yes("by default gradients are added inside the products that make them", "--no-gradient-accumulation-fusion"),
        ours("`--backend te` or `torch`", "--transformer-impl"),
        idle("Megatron no longer reads it", "--use-flash-attn --use-mcore-models --onnx-safe"),
        yes("", "--enable-experimental"),
        no("Megatron 0.19.2 fails with it", "--config-logger-dir"),
    ],
    "Initialisation and randomness": [
        yes(
            "",
            """--seed --init-method-std --embedding-init-method-std --use-cpu-initialization --data-parallel-random-init
            --inference-rng-tracker --deterministic-mode""",
        ),
        yes("weights are uninitialised memory, for runs that load them", "--no-initialization"),
        untried("Transformer Engine", "--te-rng-tracker"),
        no("Megatron 0.19.2 fails with it", "--init-method-xavier-uniform"),
        idle("it belongs to FSDP", "--init-model-with-meta-device"),
        yes(
            "not with P layers",
            """--use-mup --mup-width-mult --mup-base-hidden-size --mup-embedding-mult --mup-output-mult
            --mup-base-head-dim --mup-attn-scale-power""",
        ),
    ],
    "Experts": [
        yes(
            "",
            """--num-experts --moe-ffn-hidden-size --moe-router-topk --moe-router-load-balancing-type
            --moe-aux-loss-coeff --moe-z-loss-coeff --moe-input-jitter-eps --moe-router-score-function
            --moe-router-pre-softmax --moe-router-topk-scaling-factor --moe-router-dtype
            --moe-router-enable-expert-bias --moe-router-bias-update-rate --moe-router-num-groups
            --moe-router-group-topk --moe-router-force-load-balancing --moe-router-force-biased
            --moe-router-quantile-balancing-ema --moe-shared-expert-intermediate-size --moe-shared-expert-gate
            --moe-shared-expert-overlap --moe-per-layer-logging --moe-expert-capacity-factor
            --moe-pad-expert-input-to-capacity --moe-token-drop-policy --moe-apply-probs-on-input --moe-grouped-gemm
            --moe-token-dispatcher-type --moe-enable-routing-replay""",
        ),
        untried(
            "Transformer Engine",
            """--moe-shared-expert-glu-interleave-size --moe-mlp-glu-interleave-size --moe-router-fusion
            --moe-permute-fusion --moe-router-padding-for-quantization --moe-router-padding-for-fp8
            --use-grouped-gemm-for-shared-expert --use-grouped-gemm-for-dense-mlp --moe-single-grouped-weight
            --moe-single-grouped-bias --delay-wgrad-compute --overlap-dispatch-backward-with-experts-wgrad
            --high-priority-a2a-comm-stream --moe-paged-stash --moe-paged-stash-page-size
            --moe-paged-stash-buffer-size-factor-cuda --moe-paged-stash-buffer-size-factor-cpu""",
        ),
        untried(
            "the flex dispatcher and its packages; refused without these",
            """--moe-enable-deepep --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
            --moe-hybridep-pad-uneven-dispatch-inputs --moe-flex-dispatcher-num-sms --moe-deepep-num-sms
            --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute --moe-hybridep-num-blocks-unpermute
            --moe-hybridep-num-sms-preprocessing --moe-ncclep-static-shape --moe-ncclep-zero-copy
            --moe-expert-rank-capacity-factor""",
        ),
        ruled_out("parameters and FLOPs of such experts are not counted", "--moe-latent-size"),
        no("E in the pattern says which layers have experts", "--moe-layer-freq"),
        no(
            "Megatron's schedule for it does not support hybrids",
            "--overlap-moe-expert-parallel-comm --ep-overlap-early-attn-memory-release",
        ),
    ],
    "Prediction heads": [
        yes(
            "one /LAYERS in the pattern for each head",
            """--mtp-num-layers --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-detach-heads
            --mtp-hybrid-override-pattern""",
        ),
        no("the pattern says where the stages are", "--mtp-standalone"),
    ],
    "Precision": [
        yes(
            "`--fp32-residual-connection`: the norms round to the parameters' dtype",
            """--bf16 --fp16 --fp32-residual-connection --loss-scale --initial-loss-scale --min-loss-scale
            --loss-scale-window --hysteresis --fp16-lm-cross-entropy --accumulate-allreduce-grads-in-fp32
            --grad-reduce-in-bf16 --disable-bf16-reduced-precision-matmul""",
        ),
        yes(
            "Transformer Engine on CUDA, with the recipes `tensorwise`, `delayed` and `blockwise`; linear layers are "
            "in 8 bits, scans, convolutions, attention, router and output head in bf16",
            "--fp8-format --fp8-recipe",
        ),
        untried(
            "Transformer Engine on CUDA",
            """--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo --no-fp8-wgrad
            --fp8-output-proj --fp8-quantizer-factory --fp8-param-gather --first-last-layers-bf16
            --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 --fp4-format --fp4-recipe
            --fp4-quantizer-factory --fp4-param-gather --te-precision-config-file --reuse-grad-buf-for-mxfp8-param-ag
            --keep-fp8-transpose-cache""",
        ),
    ],
    "Recomputation and offloading": [
        yes(
            "",
            """--recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
            --recompute-activations --distribute-saved-activations""",
        ),
        yes("--recompute-granularity selective with moe is its new name", "--moe-layer-recompute"),
        no(
            "Megatron's hybrid stack does not offload activations layer by layer",
            "--cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers",
        ),
        untried(
            "Transformer Engine",
            """--fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
            --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks --activation-offload-fraction
            --fine-grained-offloading-max-inflight-offloads""",
        ),
    ],
    "CUDA graphs": [
        untried(
            "on CUDA",
            """--cuda-graph-impl --cuda-graph-warmup-steps --cuda-graph-modules --cuda-graph-scope --enable-cuda-graph
            --external-cuda-graph""",
        ),
    ],
}
