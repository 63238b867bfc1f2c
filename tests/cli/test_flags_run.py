"""Megatron's flags in a hybrid's run: each is in the table, and each family does what the table says."""

import pytest

from megatron_hybrid.cli.flag_table import all_flags
from tests.cli import flag_cases as cases


def test_the_table_has_each_flag_of_the_parser_once(ranks):
    spellings = ranks(1).run(cases.spellings)[0]
    listed = [flag for row in all_flags.rows() for flag in row.flags.split()]
    assert len(listed) == len(set(listed))
    assert [names for names in spellings if set(names).isdisjoint(listed)] == []  # new upstream: say what becomes of it
    assert set(listed) - {name for names in spellings for name in names} == set()  # gone upstream
    assert {row.kind for row in all_flags.rows()} == {"supported", "translated", "refused", "no effect"}


TRAIN = [
    # a line for several families: precision, optimizer, schedule, logs
    (
        "--bf16 --use-distributed-optimizer --lr-decay-style cosine --min-lr 0 --weight-decay-incr-style linear "
        "--start-weight-decay 0 --end-weight-decay 0.1 --timing-log-level 2 --log-timers-to-tensorboard "
        "--log-memory-to-tensorboard --log-params-norm --log-num-zeros-in-grad --tensorboard-dir {0}/tensorboard",
        "M-*-",
    ),
    # layers, initialisation, recomputation, faults, one of no effect
    (
        "--qk-l2-norm --attention-output-gate --init-method-std 0.02 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --check-for-spiky-loss --img-h 10 "
        "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
        "M-*-",
    ),
    # experts, heads, data
    (
        "--moe-router-topk 2 --moe-shared-expert-gate --moe-z-loss-coeff 1e-3 --mtp-loss-scaling-factor 0.3 "
        "--reset-attention-mask --eod-mask-loss",
        "ME*-/M-",
    ),
    # no interval for validations nor checkpoints: one of each at the end
    ("--eval-iters 1 --save {0}/save", "M-"),
    ("--optimizer sgd --position-embedding-type learned_absolute --use-rotary-position-embeddings", "M-*-"),
]
REFUSE = [
    ("--experimental-attention-variant dsa", ["--experimental-attention-variant is not supported", "D is not there"]),
    ("--init-method-xavier-uniform", ["--init-method-xavier-uniform", "Drop it"]),
    ("--spec gpt layers", ["--spec gpt layers", "--backend"]),
    ("--attention-backend local", ["--attention-backend local", "--backend torch"]),
    ("--transformer-impl inference_optimized", ["for inference"]),
    ("--optimizer lion", ["--optimizer lion", "emerging-optimizers", "adam or sgd"]),
    ("--optimizer sgd --use-distributed-optimizer", ["--optimizer sgd", "drop one"]),
    ("--use-precision-aware-optimizer", ["--use-precision-aware-optimizer needs Transformer Engine"]),
    ("--exp-avg-dtype bf16", ["--exp-avg-dtype bf16", "--use-precision-aware-optimizer"]),
    ("--lr-warmup-iters 1", ["--lr-warmup-iters is 1 of 1 iters"]),
    ("--lr-warmup-fraction 2", ["--lr-warmup-fraction 2 is 2 of 1"]),
    ("--lr-decay-style WSD", ["--lr-wsd-decay-iters"]),
    ("--min-lr 1", ["--min-lr 1", "between 0 and the first"]),
    ("--train-iters 0", ["no length", "--train-iters N"]),
    ("--eval-interval 0", ["--eval-interval is 0", "--eval-iters 0"]),
    ("--log-interval 0", ["--log-interval is 0"]),
    ("--save-wgrads-interval 1", ["--save-wgrads-interval", "--save FOLDER"]),
    ("--multiple-validation-sets", ["--full-validation"]),
    ("--exit-signal SIGKILL", ["SIGKILL", "SIGUSR1"]),
    ("--profile", ["--use-pytorch-profiler"]),
    ("--use-sharp", ["--use-sharp", "gloo"]),
    ("--enable-cuda-graph", ["CUDA device"]),
    ("--use-torch-fsdp2", ["--use-torch-fsdp2 is not supported"]),
    ("--perform-rl-step", ["reinforcement learning"]),
    ("--inprocess-restart", ["tools/launch.py"]),
    ("--mtp-num-layers 1", ["M-*- has no prediction heads"]),
    ("--reuse-grad-buf-for-mxfp8-param-ag", ["Megatron refuses", "MXFP8"]),  # by a dataclass of the training's
]


def test_a_value_of_each_family_trains(ranks, tmp_path):
    found = ranks(1).run(cases.runs, lines=[(line.format(tmp_path), pattern) for line, pattern in TRAIN])[0]
    for (line, _), (code, out, errors) in zip(TRAIN, found, strict=True):
        assert (code, "iteration        1/       1" in out) == (0, True), (line, errors)
    assert "note     without effect on this run: --img-h (docs/flags.md)" in found[1][1]
    assert "validation loss at iteration 1" in found[3][1]
    assert (tmp_path / "save" / "iter_0000001" / "integrity.json").is_file()


def test_what_cannot_be_is_one_paragraph_before_the_model(ranks):
    found = ranks(1).run(cases.runs, lines=[(line, "M-*-") for line, _ in REFUSE])[0]
    for (line, words), (code, out, errors) in zip(REFUSE, found, strict=True):
        assert (code, errors[:7], "\n\n" in errors) == (2, "error: ", False), (line, errors)
        assert "building" not in out and len(errors) < 500, line
        for word in words:
            assert word in errors, line


def test_the_residual_stream_stays_in_fp32(ranks):
    flags = "--bf16 --fp32-residual-connection --clip-grad 0 --global-batch-size 1"
    found = ranks(1).run(cases.residual_stream, flags=flags, pattern="M-*-P-W-")[0]
    assert len(found["dtypes"]) == 8 and set(found["dtypes"]) == {"torch.float32"}
    # upstream's Mamba layer rounds its input in front of the norm (core/ssm/mamba_layer.py:151), the others do not
    assert sorted({given for given, _, _ in found["norms"]}) == ["torch.bfloat16", "torch.float32"]
    assert {(made, right) for _, made, right in found["norms"]} == {("torch.bfloat16", True)}
    assert all(found["sums"])
    plain = ranks(1).run(cases.residual_stream, flags="--bf16 --clip-grad 0 --global-batch-size 1", pattern="M-*-P-W-")[
        0
    ]
    assert set(plain["dtypes"]) == {"torch.bfloat16"} and not all(plain["sums"])
    assert found["step"] == pytest.approx(plain["step"], rel=0.02)
