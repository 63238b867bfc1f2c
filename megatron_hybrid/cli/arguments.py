"""From flags to Megatron's checked arguments: device, backend, and what the user must change."""

import argparse
import contextlib
import difflib
import io
import os
import socket
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from megatron_hybrid import costs
from megatron_hybrid.argv import value, without
from megatron_hybrid.checkpoint import saving
from megatron_hybrid.cli import connections
from megatron_hybrid.cli.config import HybridConfig, IntraConfig
from megatron_hybrid.cli.flag_table import all_flags, rules
from megatron_hybrid.cli.flags import Command
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.patches.upstream import has_module
from megatron_hybrid.training import data_checks, validation

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
"""What torchrun sets and Megatron's parser reads."""
# What upstream's fast paths need beyond torch. Our torch layers do without, on CUDA too.
_TORCH_BACKEND_FLAGS = [
    "--transformer-impl=local",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
]
USAGE = """pretrain_hybrid.py --list-recipes
       pretrain_hybrid.py --recipe NAME [--print-config] [any flag below; overrides the recipe]
       pretrain_hybrid.py --hybrid-layer-pattern 'M-M-P-' [any flag below]"""
# torch.compile is off on the CPU engine, so upstream's jitted fusions would only add work.
_CPU_FLAGS = ["--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-bias-gelu-fusion"]


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda`` for this process; installs the CPU engine for ``cpu``.

    Raises:
        ValueError: CUDA is asked for and there is no device.
    """
    import torch

    from megatron_hybrid.patches import cpu

    available = not cpu.is_active() and torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ValueError(
            "--device cuda: torch finds no CUDA device. Check nvidia-smi and that this torch is a CUDA build "
            f"(it is {torch.__version__}), or run on the CPU engine with --device cpu."
        )
    device = "cuda" if available and asked != "cpu" else "cpu"
    for module in ("transformer_engine", "apex", "fla") if device == "cpu" else ():
        if has_module(module):  # upstream copies their CUDA kernels into its modules on import
            raise ValueError(
                f"The CPU engine does not run where {module} is installed, since Megatron would call its CUDA kernels: "
                "use an environment with only requirements.txt, such as that of `make setup` in another clone."
            )
    if device == "cpu":
        cpu.install()
    return device


def choose_backend(asked: str, device: str) -> str:
    """``te`` or ``torch``.

    Raises:
        ValueError: Transformer Engine is asked for and cannot run here.
    """
    installed = has_module("transformer_engine")
    if asked == "te" and (device == "cpu" or not installed):
        reason = "it runs only on CUDA" if device == "cpu" else "it is not installed (requirements-gpu.txt)"
        raise ValueError(f"--backend te: Transformer Engine is not available: {reason}. Use --backend torch.")
    if asked == "auto":
        return "te" if device == "cuda" and installed else "torch"
    return asked


def choose_ssm_kernels(asked: str, device: str) -> str:
    """``triton``, ``mamba_ssm`` or ``torch``.

    Raises:
        ValueError: What is asked for cannot run here.
    """
    from megatron_hybrid.kernels import ssm_backend

    try:
        return ssm_backend(device, asked)
    except ValueError as error:
        raise ValueError(f"--ssm-kernels {asked}: {error}.") from None


def add_hybrid_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag for each field of our configurations (training/argument_utils.py:45).

    The parser then answers a mistake with one line; its usage alone would be pages long.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(HybridConfig).build_group(parser, "hybrid")
    ArgumentGroupFactory(IntraConfig).build_group(parser, "intra-layer hybrid")
    for layer in LAYERS.values():
        if layer.flags:
            ArgumentGroupFactory(layer.flags).build_group(parser, layer.name)
    parser.usage = USAGE
    parser.formatter_class = _HelpFormatter
    known = ["--print-config", "--list-recipes"]
    known += [name for action in parser._actions for name in action.option_strings]

    def error(message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        close = [c for word in words if word.startswith("--") for c in difflib.get_close_matches(word, known, 3, 0.8)]
        raise ValueError(f"{message}. " + (f"Did you mean {', '.join(close)}? " if close else "") + "See --help.")

    parser.error = error  # type: ignore[method-assign]
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Shows a help text that argparse cannot expand as it stands: upstream's have a bare "%"."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def help_text() -> str:
    """All flags, Megatron's and ours, ours last."""
    import_megatron_quietly(tokenizers=False)
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_hybrid_flags(add_megatron_arguments(parser)).format_help()


@contextlib.contextmanager
def command_line(flags: Sequence[str], launched: bool = True) -> Iterator[None]:
    """``flags`` in ``sys.argv``, where Megatron's parser reads them; afterwards that is as it was.

    launched: This process is a rank of the run that the flags describe. Otherwise the launcher's variables are hidden
        from the parser, connections are set as the run would set them, and the environment is as it was afterwards.
    """
    words, environment = sys.argv, dict(os.environ)
    sys.argv = [words[0], *flags]
    try:
        if not launched:
            for name in LAUNCHER:
                os.environ.pop(name, None)
            connections.set_connections(flags)
        set_single_process_defaults()
        yield
    finally:
        sys.argv = words
        if not launched:
            os.environ.clear()
            os.environ.update(environment)


def parse(
    argv: list[str], device: str, print_config: bool = False, world: int | None = None, launched: bool = True
) -> Namespace:
    """Megatron's arguments, checked by us and by upstream, and set as its globals.

    Args:
        argv: Resolved flags (:func:`megatron_hybrid.cli.flags.resolve`).
        device: ``cpu`` or ``cuda``, as :func:`choose_device` says.
        print_config: The run ends before it reads data, so none need be given.
        world: With ``print_config``: the number of processes; default the fewest that the layout fits.
        launched: As for :func:`command_line`.

    Returns:
        With ``backend`` and ``device`` as chosen, and ``notes`` for the user.

    Raises:
        ValueError: Flags that cannot work, with the reason and the remedy.
    """
    all_flags.refuse(argv)
    implied = "torch" if value(argv, "--transformer-impl") == "local" else "auto"
    backend = choose_backend(value(argv, "--backend", implied), device)
    with command_line(_engine_flags(argv, device, backend), launched):
        return _parse(argv, device, backend, print_config, world)


def _parse(argv: list[str], device: str, backend: str, print_config: bool, world: int | None) -> Namespace:
    """:func:`parse`, with flags and environment as Megatron's parser reads them."""
    import_megatron_quietly(tokenizers=not print_config)
    from megatron.training import arguments

    args = arguments.parse_args(add_hybrid_flags)
    kernels = choose_ssm_kernels(args.ssm_kernels, device)
    args.backend, args.ssm_kernels, args.device = backend, kernels, device
    args.device_capability = _capability(device)
    rules.read_old_names(args)
    from megatron_hybrid.cli.checks import check, smallest_world

    if print_config and (world or "TORCHELASTIC_RUN_ID" not in os.environ):
        args.world_size = world or max(1, smallest_world(args))
    rules.check_flags(args, argv)
    check(args)
    validation.check(args)
    notes = all_flags.notes(argv) + rules.notes(argv)
    if not print_config:
        rules.check_schedule(args)
        data_checks.check_data(args)
        data_checks.check_tokenizer(args)
        notes += data_checks.check_provenance(args)
    with upstream_errors_as_value_errors():
        if print_config:
            with contextlib.redirect_stdout(io.StringIO()):  # upstream lists every argument it has
                arguments.validate_args(args)
        else:
            args = arguments.parse_and_validate_args(extra_args_provider=add_hybrid_flags)
    args.backend, args.ssm_kernels, args.device, args.notes = backend, kernels, device, notes
    args.device_capability = _capability(device)
    args.data_contents = {}
    if print_config:
        args.vocab_size = data_checks.vocabulary(args)
    else:
        data_checks.compare_tokenizer(args)
    saving.check(args, asked_async="--async-save" in argv)
    return args


def balance(command: Command, device: str, launched: bool = True) -> Command:
    """The command with its layers cut into ``command.balance`` pipeline segments of equal work.

    launched: As for :func:`command_line`.

    Raises:
        ValueError: More segments than layers, segments that do not divide over the stages, or no --vocab-size: the
            output head is the work of several layers.
    """
    if command.balance is None:
        return command
    with command_line(_engine_flags(command.argv, device, "torch"), launched):
        import_megatron_quietly(tokenizers=False)
        from megatron.training import arguments

        args = arguments.parse_args(add_hybrid_flags)
    args.vocab_size = data_checks.vocabulary(args)
    if args.vocab_size is None:
        raise ValueError(
            "--balance-pipeline needs --vocab-size, since the output head is the work of several layers; an "
            "approximate number is enough without the tokenizer."
        )
    from megatron_hybrid.cli.checks import check_sizes

    check_sizes(args)
    pp = args.pipeline_model_parallel_size
    pp = command.balance if pp == 1 else pp
    cut = costs.balance_pipeline(command.pattern, costs.sizes_of(args), command.balance, pp)
    return command.with_pattern(cut, pp)


def import_megatron_quietly(tokenizers: bool = True) -> None:
    """Imports Megatron without its warnings about packages that are missing by choice; registers our symbols.

    tokenizers: Also Megatron's tokenizers, with transformers: 1.5 s that flags alone do without.

    What is missing and matters is said by :func:`megatron_hybrid.patches.upstream.prepare`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of upstream's sources, wherever their bytecode cannot be kept
        for package in ("Apex", "Transformer Engine", "transformer-engine", "absl"):
            warnings.filterwarnings("ignore", message=f".*{package}")
        import megatron.training.training  # noqa: F401
    from megatron_hybrid.patches.parsing import before_parsing

    before_parsing(tokenizers)


def set_single_process_defaults() -> None:
    """Lets a run of one process start without torchrun."""
    if "RANK" in os.environ:
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, default in single.items():
        os.environ.setdefault(name, str(default))


def check_configs(args: Namespace, config: Any) -> None:
    """Builds what upstream makes of the flags when training starts, so that its checks end the run before that.

    config: The model's; None for ``--print-config``.
    """
    if config is not None:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        pretrain_cfg_container_from_args(args, config)


def _capability(device: str) -> tuple[int, int] | None:
    """Of this process's GPU; None on the CPU, and where a run on GPUs is only planned."""
    import torch

    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None


def _engine_flags(argv: list[str], device: str, backend: str) -> list[str]:
    # the number of stages is checked against the pattern by then, and Megatron takes it from the pattern alone
    flags = [*without(argv, "--num-virtual-stages-per-pipeline-rank"), *rules.defaults(argv)]
    if backend == "torch":
        flags += _TORCH_BACKEND_FLAGS
    flags += saving.saving_flags(argv, device)
    if device == "cpu":
        asked = value(argv, "--distributed-backend", "gloo")
        if asked != "gloo":
            raise ValueError(f"--distributed-backend {asked}: the CPU engine communicates over gloo. Drop it.")
        flags += [*_CPU_FLAGS, "--distributed-backend=gloo"]
    return flags
