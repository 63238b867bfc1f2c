"""Messages of preprocessing: counts, speeds, and the flags with which training reads the result."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.data.encode import Encoded
from megatron_hybrid.data.preprocess import Preprocessing


def parse_shard(text: str) -> tuple[int, int]:
    """Read I/N; raises ValueError for anything else."""
    index, _, count = text.partition("/")
    if not (text.isascii() and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard {text}: give I/N, such as 0/4 for the first of four parts.")
    return int(index), int(count)


def work(run: Preprocessing, threads: int) -> str:
    """Print what will be done."""
    counts = ((len(run.segments), "file"), (threads, "thread"))
    return ", ".join([*(f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts), run.engine])


def lines(run: Preprocessing, manifests: list[dict], speed: "Speed") -> Iterator[str]:
    """Print what was made, how fast, and how training reads it."""
    for prefix, manifest in zip(run.prefixes, manifests, strict=True):
        yield summary(prefix, manifest)
    if run.done.skipped:
        yield f"bad records that were skipped: {run.done.skipped:,}; {run.report} lists them"
    if run.done.corrected:
        yield f"gigatoken's ids of {run.done.corrected:,} texts were wrong, and were replaced; please report them to it"
    if not run.complete:
        yield speed.report()
    yield f"training reads it with {training_flags(run.prefixes[0], manifests[0]['tokenizer'])}"
    if not run.encoding.append_eod:
        yield "documents have no end token: give --append-eod, unless the model is meant to read across them"


def training_flags(prefix: Path, tokenizer: dict) -> str:
    """Return the flags of pretrain_hybrid.py for a data set; ``tokenizer`` is its manifest's."""
    kind, model = tokenizer["type"], f"--tokenizer-model {tokenizer['model']}"
    flags = {
        "ByteTokenizer": "--tokenizer-type NullTokenizer --vocab-size 258",
        "HuggingFaceTokenizer": f"--tokenizer-type {kind} {model} --tokenizer-hf-no-include-special-tokens",
        "TikTokenizer": f"--tokenizer-type {kind} {model} --tiktoken-pattern {tokenizer.get('pattern')} "
        f"--tiktoken-num-special-tokens {tokenizer.get('num_special_tokens')} --vocab-size {tokenizer['vocab_size']}",
    }
    return f"--data-path {prefix} " + flags.get(kind, f"--tokenizer-type {kind} {model}")


def summary(prefix: Path, manifest: dict) -> str:
    """One line on what a data set contains and what was left out."""
    encoded = manifest["encoded"]
    left_out = {"empty": encoded["empty"], **encoded["filtered"], "duplicates": manifest["duplicates"]}
    notes = "".join(f", {count:,} {name} left out" for name, count in left_out.items() if count)
    rate = encoded["bytes_per_token"]
    text = f"{prefix}.bin: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
    return text + (f", {rate:.2f} bytes per token" if rate else "") + notes


class Speed:
    """How much is done, and how fast.

    Args:
        bar: A tqdm bar of bytes, which is moved.
        start: When the program began, of ``time.perf_counter``.
    """

    def __init__(self, bar: Any, start: float) -> None:
        self.bytes = self.tokens = self.first_bytes = 0
        self.began = time.perf_counter()
        self.first = self.last = 0.0
        self.bar, self.start = bar, start

    def count(self, encoded: Encoded) -> None:
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
        seconds, steady = time.perf_counter() - self.start, self.last - self.first
        text = f"{seconds:.1f} s, {self.bytes / seconds / 1e6:.1f} MB/s in all"
        if steady > 0.1:
            text += f", {(self.bytes - self.first_bytes) / steady / 1e6:.1f} MB/s once at work"
        return f"{text}; first documents after {self.first - self.start:.2f} s" if self.first else text
