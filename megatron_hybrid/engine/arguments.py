"""From flags to Megatron's checked arguments: device, backend, and what the user must change."""

import argparse
import contextlib
import difflib
import io
import os
import socket
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_hybrid import costs
from megatron_hybrid.config import HybridConfig, IntraConfig
from megatron_hybrid.data.blend import DEFAULT_SPLIT, check_parts, split_fractions
from megatron_hybrid.engine import (
    checkpoint_settings,
    connections,
    datasets,
    optimizer_state,
    saving,
    unpickling,
    validation,
)
from megatron_hybrid.engine.resume import takes_weights_alone
from megatron_hybrid.engine.upstream import has_module, register_symbols
from megatron_hybrid.flags import Command, value, without
from megatron_hybrid.model.flags import rules, table

# What upstream's fast paths need beyond torch. Our torch layers do without, on CUDA too.
_TORCH_BACKEND_FLAGS = [
    "--transformer-impl=local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
]
USAGE = """pretrain_hybrid.py --list-recipes
       pretrain_hybrid.py --recipe NAME [--print-config] [any flag below, which wins over the recipe]
       pretrain_hybrid.py --hybrid-layer-pattern 'M-M-P-' [any flag below]"""
# torch.compile is off on the CPU engine, so upstream's jitted fusions would only add work.
_CPU_FLAGS = ["--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-bias-gelu-fusion"]


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda`` for this process; installs the CPU engine for ``cpu``.

    Raises:
        ValueError: CUDA is asked for and there is no device.
    """
    import torch

    from megatron_hybrid.engine import cpu

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
                "use an environment with requirements.txt alone, such as that of `make setup` in another clone."
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
        reason = "it runs on CUDA alone" if device == "cpu" else "it is not installed (requirements-gpu.txt)"
        raise ValueError(f"--backend te: Transformer Engine is not available: {reason}. Use --backend torch.")
    if asked == "auto":
        return "te" if device == "cuda" and installed else "torch"
    return asked


def add_hybrid_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag for each field of our configurations (training/argument_utils.py:45).

    The parser then answers a mistake with one line; its usage alone would be pages long.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(HybridConfig).build_group(parser, "hybrid")
    ArgumentGroupFactory(IntraConfig).build_group(parser, "intra-layer hybrid")
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
    import_megatron_quietly()
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_hybrid_flags(add_megatron_arguments(parser)).format_help()


def parse(argv: list[str], device: str, print_config: bool = False, world: int | None = None) -> Namespace:
    """Megatron's arguments, checked by us and by upstream, and set as its globals.

    Args:
        argv: Resolved flags (:func:`megatron_hybrid.flags.resolve`).
        device: ``cpu`` or ``cuda``, as :func:`choose_device` says.
        print_config: The run ends before it reads data, so none need be given.
        world: With ``print_config``: the number of processes; default the fewest that the layout fits.

    Returns:
        With ``backend`` and ``device`` as chosen, and ``notes`` for the user.

    Raises:
        ValueError: Flags that cannot work, with the reason and the remedy.
    """
    set_single_process_defaults()
    connections.set_connections(argv)
    import_megatron_quietly()
    from megatron.training import arguments

    table.refuse(argv)
    implied = "torch" if value(argv, "--transformer-impl") == "local" else "auto"
    backend = choose_backend(value(argv, "--backend", implied), device)
    sys.argv = [sys.argv[0], *_engine_flags(argv, device, backend)]
    args = arguments.parse_args(add_hybrid_flags)
    args.backend, args.device = backend, device
    rules.read_old_names(args)
    from megatron_hybrid.model.checks import check, smallest_world

    if print_config and (world or "TORCHELASTIC_RUN_ID" not in os.environ):
        args.world_size = world or max(1, smallest_world(args))
    rules.check_flags(args, argv)
    check(args)
    validation.check(args)
    notes = table.notes(argv) + rules.notes(argv)
    if not print_config:
        rules.check_schedule(args)
        check_data(args)
        check_tokenizer(args)
        notes += check_provenance(args)
    with upstream_errors_as_value_errors():
        if print_config:
            with contextlib.redirect_stdout(io.StringIO()):  # upstream lists every argument it has
                arguments.validate_args(args)
        else:
            args = arguments.parse_and_validate_args(extra_args_provider=add_hybrid_flags)
    args.backend, args.device, args.notes = backend, device, notes
    args.data_contents = {}
    if print_config:
        args.vocab_size = _vocabulary(args)
    else:
        compare_tokenizer(args)
    saving.check(args, asked_async="--async-save" in argv)
    return args


def balance(command: Command, device: str) -> Command:
    """The command with its layers cut into ``command.balance`` pipeline segments of equal work.

    Raises:
        ValueError: More segments than layers, segments that do not divide over the stages, or no --vocab-size: the
            output head is the work of several layers.
    """
    if command.balance is None:
        return command
    import_megatron_quietly()
    from megatron.training import arguments

    sys.argv = [sys.argv[0], *_engine_flags(command.argv, device, "torch")]
    args = arguments.parse_args(add_hybrid_flags)
    args.vocab_size = _vocabulary(args)
    if args.vocab_size is None:
        raise ValueError(
            "--balance-pipeline needs --vocab-size, since the output head is the work of several layers; a rounded "
            "number will do where the tokenizer is not at hand."
        )
    from megatron_hybrid.model.checks import check_sizes

    check_sizes(args)
    pp = args.pipeline_model_parallel_size
    pp = command.balance if pp == 1 else pp
    cut = costs.balance_pipeline(command.pattern, costs.Sizes.from_args(args), command.balance, pp)
    return command.with_pattern(cut, pp)


def import_megatron_quietly() -> None:
    """Imports Megatron without its warnings about packages that are missing by choice; registers our symbols.

    What is missing and matters is said by :func:`megatron_hybrid.engine.upstream.prepare`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of upstream's sources, wherever their bytecode cannot be kept
        for package in ("Apex", "Transformer Engine", "transformer-engine", "absl"):
            warnings.filterwarnings("ignore", message=f".*{package}")
        import megatron.training.training  # noqa: F401
    from megatron_hybrid.engine.tokenizers import size_by_largest_id

    register_symbols()
    size_by_largest_id()
    unpickling.admit_known_classes_only()


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


def check_data(args: Namespace) -> None:
    """Refuses a run without data, or whose data files are not there or too small, before any process group starts.

    Raises:
        ValueError: With the file and how to make it.
    """
    listed = datasets.prefixes(args)
    if args.mock_data:
        return
    if not listed:
        raise ValueError(
            "The run has no data: give --data-path PREFIX (made by tools/preprocess_data.py), --data-blend FILE, "
            "or --mock-data for random tokens."
        )
    for prefix in listed:
        missing = [prefix + end for end in (".idx", ".bin") if not Path(prefix + end).is_file()]
        if missing:
            raise ValueError(
                f"{prefix}, which is given as data: there is no {missing[0]}. Give the prefix of a .bin/.idx pair, "
                "without the ending; tools/preprocess_data.py makes one from text."
            )
    if not (args.data_path or args.data_args_path):
        return
    split = args.split or DEFAULT_SPLIT
    if args.eval_iters and split_fractions(split)[1] == split_fractions(split)[0]:
        raise ValueError(
            f"--split {split} leaves nothing for validation, and --eval-iters is {args.eval_iters}: give "
            "--eval-iters 0, or a part such as --split 98,1,1."
        )
    for prefix in listed:
        check_parts(prefix, split)


def check_tokenizer(args: Namespace) -> None:
    """Refuses a run whose vocabulary is not known.

    Raises:
        ValueError: With the flag that is missing, or the file that is not there.
    """
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind is None:
        raise ValueError(
            "The run has no tokenizer: give --tokenizer-type SentencePieceTokenizer --tokenizer-model FILE (made by "
            "tools/train_tokenizer.py), or --tokenizer-type NullTokenizer --vocab-size N for data without text."
        )
    if kind.startswith("Null") and args.vocab_size is None:
        raise ValueError(f"--tokenizer-type {kind} has no vocabulary of its own: give --vocab-size.")
    if kind.endswith("SentencePieceTokenizer") and not (model and Path(model).is_file()):
        raise ValueError(f"--tokenizer-type {kind}: there is no file --tokenizer-model {model}.")


def check_provenance(args: Namespace) -> list[str]:
    """Refuses data that another tokenizer wrote than the run's, going by their manifests; reads no data.

    Returns:
        Notes on what could not be compared, to be shown to the user.

    Raises:
        ValueError: With the data set and both tokenizers.
    """
    from megatron_hybrid.data import provenance

    if args.mock_data:
        return []
    spec = _tokenizer_spec(args)
    run = provenance.RunTokenizer(spec, args.null_tokenizer_eod_id, args.reset_attention_mask, args.eod_mask_loss)
    return provenance.check(datasets.prefixes(args), run)


def compare_tokenizer(args: Namespace) -> None:
    """Refuses a tokenizer that Megatron loads otherwise than the data's, whose fingerprint it has.

    Raises:
        ValueError: With what differs.
    """
    from megatron.training import global_vars

    from megatron_hybrid.data import provenance
    from megatron_hybrid.engine import tokenizers

    spec = _tokenizer_spec(args)
    if args.mock_data or provenance.unknown(spec):
        return
    prefix = provenance.first_known(datasets.prefixes(args))
    if prefix is not None:
        tokenizers.compare(prefix, spec, global_vars.get_tokenizer())


def _tokenizer_spec(args: Namespace) -> Any:
    """The run's tokenizer as preprocessing knows it (:class:`megatron_hybrid.data.tokenizers.TokenizerSpec`)."""
    from megatron_hybrid.data.tokenizers import TokenizerSpec

    return TokenizerSpec(
        args.tokenizer_type,
        Path(args.tokenizer_model) if args.tokenizer_model else None,
        pattern=args.tiktoken_pattern or TokenizerSpec.pattern,
        num_special_tokens=args.tiktoken_num_special_tokens,
        vocab_size=args.vocab_size or TokenizerSpec.vocab_size,
    )


def _vocabulary(args: Namespace) -> int | None:
    """Size of the vocabulary before the run has its tokenizer: that of the tokenizer's files, else --vocab-size.

    A SentencePiece or Hugging Face tokenizer has a size of its own, whatever --vocab-size says.
    """
    from megatron_hybrid.data.provenance import unknown
    from megatron_hybrid.data.tokenizers import load_tokenizer

    spec = _tokenizer_spec(args)
    if spec.model is None or not spec.model.exists() or spec.kind == "TikTokenizer" or unknown(spec):
        return args.vocab_size
    return load_tokenizer(spec).vocab_size


def check_data_content(args: Namespace) -> list[str]:
    """Refuses data that are damaged or do not fit the model (:func:`.datasets.check_content`).

    Returns:
        Notes for the user, also on data that are others than those that the checkpoint was trained on.
    """
    from megatron.core import dist_checkpointing

    notes = datasets.check_content(args)
    folder = args.checkpoint
    if folder is None or args.skip_train or not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return notes
    before = getattr(stored_arguments(folder), "data_contents", {})
    for prefix, content in args.data_contents.items():
        if before.get(prefix, content) != content:
            notes.append(
                f"{prefix} has another content than when {folder} was saved: the order of its documents is a new one"
            )
    return notes


def stored_common(folder: str) -> dict[str, Any]:
    """What a checkpoint has beside tensors: ``args`` (training/checkpointing.py:1311), ``opt_param_scheduler`` ...

    Unpickles admitted classes alone (:mod:`megatron_hybrid.engine.unpickling`); what is in the folder has to be
    verified first (:mod:`megatron_hybrid.engine.resume`).
    """
    from megatron.core import dist_checkpointing

    unpickling.admit_known_classes_only()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it has not started yet
        return dist_checkpointing.load_common_state_dict(folder)


def stored_arguments(folder: str) -> Namespace | None:
    """The arguments that upstream stores with each checkpoint; None if it has none. See :func:`stored_common`."""
    return stored_common(folder).get("args")


def check_end_of_document(args: Namespace) -> None:
    """Refuses to keep packed documents apart without a token that ends them.

    Raises:
        ValueError: With the tokenizer.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    with contextlib.redirect_stdout(io.StringIO()):  # it is built again with the data, and says so then
        eod = getattr(build_tokenizer(args), "eod", None)
    if eod is None or eod < 0:
        raise ValueError(
            "--reset-attention-mask finds documents by their last token, and the tokenizer "
            f"({args.tokenizer_type}) has no end-of-document token: use one that has, or drop the flag."
        )


def check_checkpoint(args: Namespace, print_config: bool = False) -> None:
    """Refuses to load a checkpoint of another model, or to go on under another schedule; the layout may differ.

    Stage boundaries may differ. Where the run goes on in another layout, its vocabulary stays as it is
    (:func:`keep_vocabulary`).

    args: ``checkpoint`` is the folder that :func:`megatron_hybrid.engine.resume.choose_checkpoint` has found.
    print_config: The run ends before it trains: its schedule is not compared.

    Raises:
        ValueError: With what differs, and both values.
    """
    from megatron.core import dist_checkpointing

    folder = args.checkpoint
    if folder is not None and args.rank == 0:
        unpickling.check(Path(folder))
    if folder is None or not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return
    common = stored_common(folder)
    stored = common.get("args")
    saved = getattr(stored, "hybrid_layer_pattern", None)
    if stored is None or saved is None:
        return
    if saved.replace("|", "") != args.hybrid_layer_pattern.replace("|", ""):
        raise ValueError(
            f"The checkpoint in {folder} has the layer pattern\n  {saved}\nbut this run asks for\n"
            f"  {args.hybrid_layer_pattern}\nOnly stage boundaries (|) may differ. Change the pattern or the "
            "recipe, or give another --load."
        )
    args.notes += checkpoint_settings.check_model(stored, args, folder)
    if args.ckpt_format == "torch":
        raise ValueError(f"--ckpt-format torch, and the checkpoint in {folder} is of torch_dist: drop the flag.")
    goes_on = not args.skip_train and not takes_weights_alone(args, folder)
    if goes_on:
        optimizer_state.check_optimizer_state(args, stored, folder)
    keep_vocabulary(args, stored)
    if goes_on and not print_config:
        args.notes += checkpoint_settings.check_schedule(common, args, folder)
        args.notes += checkpoint_settings.data_notes(stored, args)


def keep_vocabulary(args: Namespace, stored: Namespace) -> None:
    """Pads the vocabulary as the checkpoint does, so that a run that goes on with other tensor parallelism is the same.

    Upstream pads it to a multiple of ranks (core/tokenizers/utils/build_tokenizer.py:140), and fills what a checkpoint
    lacks with random rows: each loss would be another. A note says so where that has to be.

    Args:
        args: Megatron's; ``padded_vocab_size`` is known but for ``--print-config``.
        stored: Those in the checkpoint.
    """
    from megatron.training import global_vars

    size, padded = getattr(stored, "padded_vocab_size", None), args.padded_vocab_size
    if None in (size, padded) or size == padded:
        return
    if global_vars.get_tokenizer().vocab_size <= size and size % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = size
        args.notes.append(f"the vocabulary stays padded to {size}, as in the checkpoint")
    else:
        args.notes.append(f"the vocabulary is padded to {padded} and in the checkpoint to {size}: new rows are random")


@contextlib.contextmanager
def upstream_errors_as_value_errors() -> Iterator[None]:
    """Upstream checks arguments with asserts: their text is for the user, their trace is not.

    What else it ends by, while it does nothing but read flags, is a mistake in these, too.
    """
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error) or place.line  # an assert without a message still has a source line
        if not isinstance(error, (AssertionError, RuntimeError, ValueError, NotImplementedError)):
            text = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
        raise ValueError(f"Megatron refuses these flags: {text}") from error


def check_configs(args: Namespace, config: Any) -> None:
    """Builds what upstream makes of the flags when training starts, so that its checks end the run before that.

    config: The model's; None for ``--print-config``.
    """
    if config is not None:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        pretrain_cfg_container_from_args(args, config)


def _engine_flags(argv: list[str], device: str, backend: str) -> list[str]:
    # the number of stages is checked against the pattern by then, and Megatron takes it from the pattern alone
    flags = [*without(argv, "--num-virtual-stages-per-pipeline-rank"), *rules.defaults(argv)]
    if backend == "torch":
        flags += _TORCH_BACKEND_FLAGS
    elif not has_module("fused_weight_gradient_mlp_cuda"):
        flags.append("--no-gradient-accumulation-fusion")  # upstream's output layer needs Apex's kernel for it
    flags += saving.saving_flags(argv, device)
    if device == "cpu":
        asked = value(argv, "--distributed-backend", "gloo")
        if asked != "gloo":
            raise ValueError(f"--distributed-backend {asked}: the CPU engine communicates over gloo. Drop it.")
        flags += [*_CPU_FLAGS, "--distributed-backend=gloo"]
    return flags
