"""Megatron's flags in a hybrid's run: each is in the table, and each family does what the table says."""

import argparse
import io
from contextlib import redirect_stderr
from typing import Any

import pytest

from megatron_hybrid.cli.flag_table import all_flags
from tests.support.program import train
from tests.support.training import MOE, SIZES, STEPS, Run

# What the ranks run ---------------------------------------------------------------------------------

LINE = f"{SIZES} {STEPS} --train-iters 1 --global-batch-size 2 --eval-iters 0 --log-interval 1 --num-workers 0"
"""A run of one step; Megatron's parser takes the last of two values."""


def parser_flags() -> list[list[str]]:
    """The option strings of each flag of Megatron's parser."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    return [action.option_strings for action in parser._actions]


def run(line: str, pattern: str = "M-*-") -> tuple[int, str, str]:
    """Runs the whole program in this rank: exit code (0 when it came to its end), output and errors."""
    import pretrain_hybrid

    pretrain_hybrid.PATIENCE_S = 0.0
    out, errors, code = io.StringIO(), io.StringIO(), 0
    argv = f"{LINE} {MOE if 'E' in pattern else ''} --hybrid-layer-pattern {pattern} {line}".split()
    with redirect_stderr(errors):
        try:
            train(argv, out)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), errors.getvalue()


def runs(lines: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """The same for many; (flags, pattern) each."""
    return [run(*line) for line in lines]


def residual_stream(flags: str, pattern: str) -> dict[str, Any]:
    """The stream of hidden states of one sample through a stack: what each norm and each layer makes of it.

    Returns:
        ``dtypes`` of the layers' outputs; ``norms``: dtypes of its input and output, and whether it is the formula,
        rounded once; ``sums``: whether each layer adds its branch, as it stands, in fp32; and the first ``step``.
    """
    import torch

    from megatron_hybrid.layers.norm import RMSNorm

    run = Run(pattern, flags)
    stack = run.model[0].module.module.decoder
    found: dict[str, Any] = {"dtypes": [], "norms": [], "sums": []}

    def norm(module: Any, inputs: Any, output: Any) -> None:
        x = inputs[0].double()
        exact = x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight.double()
        error = (output.double() - exact).abs().max() / exact.abs().max()
        found["norms"].append((str(inputs[0].dtype), str(output.dtype), bool(error < 2**-8)))

    def layer(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
        x, y = kwargs.get("hidden_states", inputs[0] if inputs else None), output
        y = y[0] if isinstance(y, tuple) else y
        branch = y.double() - x.double()
        rounded = branch.to(run.args.params_dtype).double()
        found["dtypes"].append(str(y.dtype))
        # what a layer adds is a number of the parameters' type: nothing of the stream was rounded with it
        found["sums"].append(bool(((branch - rounded).abs() <= 2**-20 * (1 + x.double().abs())).all()))

    for module in stack.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(norm)
    for module in stack.layers:
        module.register_forward_hook(layer, with_kwargs=True)
    found["step"] = run.step()
    torch.set_grad_enabled(True)
    return found


# Tests ----------------------------------------------------------------------------------------------


def test_the_table_has_each_flag_of_the_parser_once(ranks):
    spellings = ranks(1).run(parser_flags)[0]
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
    ("--experimental-attention-variant dsa", ["--experimental-attention-variant is not supported", "D layers are not"]),
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
    found = ranks(1).run(runs, lines=[(line.format(tmp_path), pattern) for line, pattern in TRAIN])[0]
    for (line, _), (code, out, errors) in zip(TRAIN, found, strict=True):
        assert (code, "iteration        1/       1" in out) == (0, True), (line, errors)
    assert "note     without effect on this run: --img-h (docs/flags.md)" in found[1][1]
    assert "validation loss at iteration 1" in found[3][1]
    assert (tmp_path / "save" / "iter_0000001" / "integrity.json").is_file()


def test_what_cannot_be_is_one_paragraph_before_the_model(ranks):
    found = ranks(1).run(runs, lines=[(line, "M-*-") for line, _ in REFUSE])[0]
    for (line, words), (code, out, errors) in zip(REFUSE, found, strict=True):
        assert (code, errors[:7], "\n\n" in errors) == (2, "error: ", False), (line, errors)
        assert "building" not in out and len(errors) < 500, line
        for word in words:
            assert word in errors, line


def test_the_residual_stream_stays_in_fp32(ranks):
    flags = "--bf16 --fp32-residual-connection --clip-grad 0 --global-batch-size 1"
    found = ranks(1).run(residual_stream, flags=flags, pattern="M-*-P-W-")[0]
    assert len(found["dtypes"]) == 8 and set(found["dtypes"]) == {"torch.float32"}
    # upstream's Mamba layer rounds its input in front of the norm (core/ssm/mamba_layer.py:151), the others do not
    assert sorted({given for given, _, _ in found["norms"]}) == ["torch.bfloat16", "torch.float32"]
    assert {(made, right) for _, made, right in found["norms"]} == {("torch.bfloat16", True)}
    assert all(found["sums"])
    plain = ranks(1).run(residual_stream, flags="--bf16 --clip-grad 0 --global-batch-size 1", pattern="M-*-P-W-")[0]
    assert set(plain["dtypes"]) == {"torch.bfloat16"} and not all(plain["sums"])
    assert found["step"] == pytest.approx(plain["step"], rel=0.02)
