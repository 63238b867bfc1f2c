"""The run: optimizer, schedule, evaluation, checkpoints, faults, logs."""

from megatron_hybrid.cli.flag_table.rows import Row, idle, no, ours, ruled_out, untried, yes

FAMILIES: dict[str, list[Row]] = {
    "Optimizer": [
        yes(
            "adam, sgd (without the distributed optimizer); others need the package emerging-optimizers, not tested",
            "--optimizer",
        ),
        yes(
            "",
            """--weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum
            --use-distributed-optimizer --decoupled-lr --decoupled-min-lr --dump-param-to-param-group-map
            --apply-wd-to-qk-layernorm --no-weight-decay-cond-type --calculate-per-token-loss""",
        ),
        untried(
            "with the package emerging-optimizers",
            """--muon-momentum --muon-no-split-qkv --muon-nesterov --muon-scale-mode --muon-fp32-matmul-prec
            --muon-coefficient-type --muon-num-ns-steps --muon-tp-mode --muon-extra-scale-factor
            --muon-scalar-optimizer --lion-beta1 --lion-beta2 --no-use-layer-wise-param-layout""",
        ),
        untried(
            "with Transformer Engine's Adam; otherwise refused",
            """--use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype
            --optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
            --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params""",
        ),
        untried("on CUDA", "--optimizer-cuda-graph"),
        no("Megatron 0.19.2 accepts it and still trains all layers of a hybrid", "--freeze-all-layers"),
    ],
    "Learning rate and length": [
        yes(
            "an impossible schedule is refused with its values",
            """--lr --min-lr --lr-decay-style --lr-wsd-decay-style --lr-decay-iters --lr-decay-samples
            --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
            --lr-warmup-init --start-weight-decay --end-weight-decay --weight-decay-incr-style
            --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler""",
        ),
        yes(
            "",
            """--train-iters --train-samples --micro-batch-size --global-batch-size --step-batch-size-schedule
            --exit-interval --exit-duration-in-mins --exit-signal-handler --exit-signal
            --exit-signal-handler-for-training --iterations-to-skip --result-rejected-tracker-filename""",
        ),
        no(
            "Megatron 0.19.2 accepts and ignores it; use --step-batch-size-schedule 0:N,TOKENS:N",
            "--rampup-batch-size",
        ),
        idle("Megatron no longer reads it", "--exit-signal-handler-for-dataloader"),
        yes(
            "",
            """--decrease-batch-size-if-needed --manual-gc --manual-gc-interval --no-manual-gc-eval
            --empty-unused-memory-level --train-sync-interval --check-weight-hash-across-dp-replicas-interval""",
        ),
        untried("GPUs", "--gpu-sniff-test-interval"),
        no("Megatron has another flag for it", "--batch-size --warmup --model-parallel-size --checkpoint-activations"),
        yes("with --train-samples", "--phase-transition-iterations"),
    ],
    "Evaluation": [
        yes("without an interval: only at the end", "--eval-interval --eval-iters --start-eval-at-iter"),
        yes("", "--eval-global-batch-size --eval-micro-batch-size --skip-train --test-mode --full-validation"),
        yes("with --full-validation", "--multiple-validation-sets --validation-set-names"),
    ],
    "Checkpoints": [
        yes("without an interval: every 1,000 steps and at the end", "--save --save-interval"),
        yes(
            "",
            """--load --finetune --pretrained-checkpoint --ckpt-step --exit-on-missing-checkpoint --no-save-optim
            --no-save-rng --no-load-optim --no-load-rng --override-ckpt-iteration --load-main-params-from-ckpt
            --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo
            --ckpt-fully-parallel-save-process-group --ckpt-fully-parallel-load-process-group
            --ckpt-assume-constant-structure --no-ckpt-load-validate-sharding-integrity --dist-ckpt-strictness
            --dist-ckpt-save-pre-mcore-014 --dist-ckpt-optim-fully-reshardable
            --distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-workers""",
        ),
        yes(
            "torch_dist; torch, without manifests, so that loading needs --load-unverified; the others belong to FSDP",
            "--ckpt-format --auto-detect-ckpt-format",
        ),
        ours("always on with torch_dist", "--verify-integrity"),
        ours("--async-save selects what it needs", "--async-save --async-strategy --use-persistent-ckpt-worker"),
        untried("on GPUs", "--async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm"),
        ruled_out(
            "use --keep-last and --keep-every, which remove checkpoints when a new one is complete",
            "--save-retain-interval",
        ),
        no(
            "it would unpickle the checkpoint before it is verified; recipe and flags define the model",
            "--use-checkpoint-args --use-mp-args-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args",
        ),
        yes(
            "global, with --load-unverified: they have no manifests",
            "--non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir",
        ),
        untried(
            "with the package nvidia-resiliency-ext",
            """--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication --replication-jump
            --replication-factor""",
        ),
        no(
            "Megatron's converter does not support hybrids",
            "--ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format",
        ),
        idle("it belongs to FSDP", "--no-strict-fsdp-dtensor-load"),
        idle("it belongs to FP8", "--no-stream-ckpt-dequant"),
        idle("Megatron no longer reads it", "--use-dist-ckpt --dist-ckpt-format --ckpt-fully-parallel-save"),
        yes("", "--save-params-interval --save-tokens-per-expert-interval --save-wgrads-interval"),
        untried("Transformer Engine", "--save-activations-interval --save-dgrads-interval"),
    ],
    "Faults and restarts": [
        yes(
            "",
            """--no-check-for-nan-in-loss-and-grad --check-for-spiky-loss --check-for-large-grads --rerun-mode
            --error-injection-rate --error-injection-type""",
        ),
        untried(
            "",
            """--fault-injector-ranks --fault-injector-num-ranks --fault-injector-fault-types
            --fault-injector-fault-probabilities --fault-injector-fault-delay --fault-injector-delay-start-iteration
            --fault-injector-mtti-seconds --fault-injector-offset-seconds --fault-injector-seed""",
        ),
        no("use tools/launch.py, which restarts runs", "--inprocess-restart"),
        idle(
            "they belong to --inprocess-restart",
            """--inprocess-max-iterations --inprocess-monitor-thread-interval --inprocess-monitor-process-interval
            --inprocess-progress-watchdog-interval --inprocess-heartbeat-interval --inprocess-soft-timeout
            --inprocess-hard-timeout --inprocess-heartbeat-timeout --inprocess-barrier-timeout
            --inprocess-completion-timeout --inprocess-last-call-wait --inprocess-termination-grace-time
            --inprocess-granularity --inprocess-active-world-size --inprocess-empty-cuda-cache""",
        ),
        no(
            "use tools/launch.py, which monitors the ranks",
            """--enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters --run-workload-inspector-server
            --adlr-autoresume --adlr-autoresume-interval""",
        ),
    ],
    "Logging and profiling": [
        yes(
            "",
            """--log-interval --log-params-norm --log-throughput --log-progress --timing-log-level --timing-log-option
            --log-num-zeros-in-grad --no-barrier-with-level-1-timing --log-memory-interval --logging-level""",
        ),
        yes(
            "TensorBoard must be installed; otherwise Megatron warns and writes nothing",
            """--tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --log-timers-to-tensorboard
            --no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard
            --log-world-size-to-tensorboard""",
        ),
        yes(
            "with the package wandb (tested offline); otherwise refused",
            "--wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity",
        ),
        untried(
            "with NVIDIA's one_logger; otherwise Megatron warns",
            """--no-one-logger --one-logger-project --one-logger-run-name --one-logger-async --app-tag-run-name
            --app-tag-run-version""",
        ),
        untried("with NVML", "--log-energy --log-device-memory-used"),
        untried(
            "on CUDA, as is --profile without --use-pytorch-profiler",
            "--record-memory-history --memory-snapshot-path --record-shapes --nvtx-ranges",
        ),
        yes(
            "",
            """--profile --profile-step-start --profile-step-end --use-pytorch-profiler
            --pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra
            --profile-ranks""",
        ),
        yes(
            "",
            """--moe-routing-trace-path --moe-routing-trace-max-training-iters --moe-routing-trace-capture-logits
            --moe-routing-trace-capture-hidden-states --moe-routing-trace-dump-weights""",
        ),
        untried(
            "with NVML",
            "--log-straggler --straggler-ctrlr-port --straggler-minmax-count --disable-straggler-on-startup",
        ),
        yes(
            "with --async-save",
            "--logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir --logits-save-dtype",
        ),
    ],
}
