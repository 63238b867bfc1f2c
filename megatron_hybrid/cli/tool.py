"""What the command-line tools share. Imports nothing heavy: --help has to answer at once."""

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hybrid.data.tokenizers import TokenizerSpec


def parser(text: str) -> argparse.ArgumentParser:
    """A parser whose --help shows a program's docstring as it stands."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def data_parser(text: str) -> argparse.ArgumentParser:
    """A parser of a tool that docs/data.md describes; --help shows the first line of its docstring."""
    return argparse.ArgumentParser(
        description=text.splitlines()[0], epilog="docs/data.md has more.", allow_abbrev=False
    )


def run(main: Callable[[], None]) -> None:
    """Call a tool's ``main``; a user's mistake is one paragraph and exit code 2, no traceback.

    SIGTERM ends a tool as Ctrl-C does, so that it can flush its work to disk.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files can be any bytes
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        main()
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = ". The disk is full, or a file limit is reached: free some space." if full else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def default_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the program at once: Python's own handlers would wait until training is done."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in handlers.items():
            if callable(handler):  # else it is ignored, as in a background job of a shell
                signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a corpus is."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        help="files, globs and folders of JSON lines or plain text (also .gz, .zst) and Parquet; - is standard input",
    )
    group.add_argument(
        "--input-format",
        choices=["auto", "jsonl", "parquet", "text"],
        default="auto",
        help="auto: by the files' extensions; standard input is JSON lines",
    )
    group.add_argument(
        "--text-key",
        nargs="+",
        action="extend",
        help="key or column of the text, dots for nested keys; several keys make one data set each (default: text)",
    )
    group.add_argument(
        "--text-split",
        choices=["file", "line"],
        default="file",
        help="what a document is in plain text: a whole file (default) or each line",
    )


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a tokenizer, as Megatron calls them."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        help="SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer or ByteTokenizer "
        "(default: the first for a .model file, the second for a folder or tokenizer.json)",
    )
    group.add_argument("--tokenizer-model", type=Path, help="the tokenizer's file or folder")
    group.add_argument("--bos-token", help="Hugging Face: BOS by name (default: that of tokenizer_config.json)")
    group.add_argument("--eod-token", help="Hugging Face: end of document (default: tokenizer_config.json's eos_token)")
    group.add_argument("--tiktoken-pattern", default="v2", help="TikTokenizer: v1 or v2 (default: v2)")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000, help="TikTokenizer (default: 1000)")
    group.add_argument("--vocab-size", type=int, default=131072, help="TikTokenizer (default: 131072)")


def text_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys of --text-key."""
    return tuple(args.text_key or ["text"])  # no default in the parser: given keys would join it


def print_passed_over(files: list[str]) -> None:
    """Say which files of folders were not read."""
    for path in files[:3]:
        print(f"skipped, unknown kind of file: {path}")
    if len(files) > 3:
        print(f"and {len(files) - 3:,} more files")


def byte_bar(total: int, what: str | None = None) -> Any:
    """Return a tqdm bar of bytes on a terminal, a line a minute elsewhere; for use in a ``with`` statement.

    total: 0 if it is not known.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    interval, delay = (0.2, 0) if terminal else (60, 10)
    return tqdm(
        desc=what, total=total or None, unit="B", unit_scale=True, leave=False, mininterval=interval, delay=delay
    )


def tokenizer_spec(args: argparse.Namespace) -> "TokenizerSpec":
    """Return the tokenizer that the flags name; raises ValueError if they name none."""
    from megatron_hybrid.data.tokenizers import TokenizerSpec, guess_kind

    model = args.tokenizer_model
    if args.tokenizer_type is None and model is None:
        raise ValueError("no tokenizer: give --tokenizer-model FILE, or --tokenizer-type ByteTokenizer for bytes.")
    return TokenizerSpec(
        args.tokenizer_type or guess_kind(model),
        model,
        args.bos_token,
        args.eod_token,
        args.tiktoken_pattern,
        args.tiktoken_num_special_tokens,
        args.vocab_size,
    )
