"""What test_flags.py runs in the ranks."""

import io
from contextlib import redirect_stderr
from typing import Any

from tests.support.program import train
from tests.support.training import MOE, SIZES, STEPS, Run

LINE = f"{SIZES} {STEPS} --train-iters 1 --global-batch-size 2 --eval-iters 0 --log-interval 1 --num-workers 0"
"""A run of one step; Megatron's parser takes the last of two values."""


def spellings() -> list[list[str]]:
    """The option strings of each flag of Megatron's parser."""
    import argparse

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
