"""Tokenize a corpus into a data set of Megatron: PREFIX_KEY_document.bin, .idx and a manifest, .json.

    python tools/preprocess_data.py --input corpus/ more/*.jsonl.gz --output-prefix data/corpus \\
        --tokenizer-model my_tokenizer --append-eod

Training reads it with --data-path data/corpus_text_document. An interrupted run continues with --resume.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid.cli import tool

if TYPE_CHECKING:
    from megatron_hybrid.data.encode import Encoded
    from megatron_hybrid.data.preprocess import Preprocessing

BEGAN = time.perf_counter()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="docs/data.md has more.", allow_abbrev=False
    )
    tool.add_input_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output-prefix", type=Path, required=True, help="_KEY_document.bin, .idx and .json are appended")
    out.add_argument("--resume", action="store_true", help="continue an interrupted run, if there is one")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier output, or an unfinished one")
    out.add_argument("--shard", default="0/1", metavar="I/N", help="do the I-th of N parts of the input, from 0")
    out.add_argument("--save-every", type=float, default=10, help="seconds between states on disk (default: 10)")
    tool.add_tokenizer_flags(parser)
    doc = parser.add_argument_group("documents")
    doc.add_argument("--prepend-bos", action="store_true", help="start each document with BOS")
    doc.add_argument("--append-eod", action="store_true", help="end each document with EOS")
    doc.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="what a bad record does; those that are skipped are listed in PREFIX_KEY_document.skipped.jsonl",
    )
    doc.add_argument("--dedup", choices=["exact"], help="keep the first of documents with the same tokens")
    doc.add_argument("--min-chars", type=int, help="leave out shorter documents")
    doc.add_argument("--max-chars", type=int, help="leave out longer documents")
    doc.add_argument("--min-alphanumeric", type=float, help="least share of letters and digits, such as 0.6")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    work.add_argument(
        "--tokenizer-engine",
        choices=["auto", "gigatoken", "tokenizers"],
        default="auto",
        help="for Hugging Face tokenizers; auto: gigatoken for byte-level BPE if it gives the same ids",
    )
    work.add_argument("--verify-tokens", action="store_true", help="compare gigatoken's ids on everything (slow)")
    work.add_argument(
        "--tokenizer-memory", type=int, default=256, help="MB for gigatoken's cache, for each thread (default: 256)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from megatron_hybrid.data.encode import Encoding
    from megatron_hybrid.data.filters import Filters
    from megatron_hybrid.data.preprocess import Job, Preprocessing

    encoding = Encoding(
        tool.tokenizer_spec(args),
        keys=tool.text_keys(args),
        text_split=args.text_split,
        prepend_bos=args.prepend_bos,
        append_eod=args.append_eod,
        skip_faults=args.on_error == "skip",
        filters=Filters(args.min_chars, args.max_chars, args.min_alphanumeric),
        engine=args.tokenizer_engine,
        verify_tokens=args.verify_tokens,
        memory_limit=(args.tokenizer_memory << 20) * args.workers,
    )
    job = Job(
        inputs=tuple(args.input),
        prefix=args.output_prefix,
        encoding=encoding,
        input_format=args.input_format,
        workers=args.workers,
        shard=shard(args.shard),
        dedup=args.dedup == "exact",
        resume=args.resume,
        overwrite=args.overwrite,
        save_every=args.save_every,
        command=tuple(sys.argv),
    )
    run = Preprocessing(job)
    tool.print_passed_over(run.passed_over)
    line = run.start()
    if line:
        print(line, flush=True)
    if not run.complete:
        counts = ((len(run.segments), "file"), (args.workers, "thread"))
        files, threads = (f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts)
        print(f"{files}, {threads}, {run.engine}", flush=True)
    try:
        with Progress(run.bytes_left()) as progress:
            manifests = run.run(progress.show)
    except BaseException:
        if run.resumable:
            print(f"{run.documents:,} documents are kept; the same command with --resume continues", file=sys.stderr)
        raise
    report(run, manifests, progress)


def report(run: "Preprocessing", manifests: list[dict], progress: "Progress") -> None:
    """Print what was made, how fast, and how training reads it."""
    for prefix, manifest in zip(run.prefixes, manifests, strict=True):
        print(summary(prefix, manifest))
    if run.done.skipped:
        print(f"bad records that were skipped: {run.done.skipped:,}; {run.report} lists them")
    if run.done.corrected:
        print(
            f"gigatoken's ids of {run.done.corrected:,} texts were wrong, and were replaced; please report them to it"
        )
    if not run.complete:
        print(progress.report())
    print(f"training reads it with {training_flags(run.prefixes[0], manifests[0]['tokenizer'])}")
    if not run.encoding.append_eod:
        print("documents have no end of their own: give --append-eod unless the model is to read on across them")


def training_flags(prefix: Path, tokenizer: dict) -> str:
    kind, model = tokenizer["type"], f"--tokenizer-model {tokenizer['model']}"
    flags = {
        "ByteTokenizer": "--tokenizer-type NullTokenizer --vocab-size 258",
        "HuggingFaceTokenizer": f"--tokenizer-type {kind} {model} --tokenizer-hf-no-include-special-tokens",
        "TikTokenizer": f"--tokenizer-type {kind} {model} --tiktoken-pattern {tokenizer.get('pattern')} "
        f"--tiktoken-num-special-tokens {tokenizer.get('num_special_tokens')} --vocab-size {tokenizer['vocab_size']}",
    }
    return f"--data-path {prefix} " + flags.get(kind, f"--tokenizer-type {kind} {model}")


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (text.isascii() and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard {text}: give I/N, such as 0/4 for the first of four parts.")
    return int(index), int(count)


def summary(prefix: Path, manifest: dict) -> str:
    encoded = manifest["encoded"]
    left_out = {"empty": encoded["empty"], **encoded["filtered"], "duplicates": manifest["duplicates"]}
    notes = "".join(f", {count:,} {name} left out" for name, count in left_out.items() if count)
    rate = encoded["bytes_per_token"]
    text = f"{prefix}.bin: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
    return text + (f", {rate:.2f} bytes per token" if rate else "") + notes


class Progress:
    """A bar on a terminal, a line a minute elsewhere: MB/s, tokens/s, time left."""

    def __init__(self, total: int) -> None:
        self.bytes = self.tokens = self.first_bytes = 0
        self.began = time.perf_counter()
        self.first = self.last = 0.0
        self.bar = tool.byte_bar(total)

    def show(self, encoded: "Encoded") -> None:
        """Count one batch."""
        self.bytes += encoded.batch.read_bytes
        self.last = time.perf_counter()
        if not self.first:
            self.first, self.first_bytes = self.last, self.bytes
        self.tokens += sum(documents.ids.size for documents in encoded.documents)
        rate = self.tokens / (time.perf_counter() - self.began)
        self.bar.set_postfix_str(f"{rate / 1e6:.2f} M tokens/s", refresh=False)
        self.bar.update(encoded.batch.read_bytes)

    def report(self) -> str:
        """Time and speed: of everything, and from the first batch to the last."""
        seconds, steady = time.perf_counter() - BEGAN, self.last - self.first
        text = f"{seconds:.1f} s, {self.bytes / seconds / 1e6:.1f} MB/s in all"
        if steady > 0.1:
            text += f", {(self.bytes - self.first_bytes) / steady / 1e6:.1f} MB/s once at work"
        return f"{text}; first documents after {self.first - BEGAN:.2f} s" if self.first else text

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()


if __name__ == "__main__":
    tool.run(main)
