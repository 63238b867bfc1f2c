"""Tokenize JSON lines into a data set of Megatron: PREFIX_text_document.bin and .idx.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model --append-eod

Training reads it with --data-path data/corpus_text_document.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_hybrid.data import cli
from megatron_hybrid.data.preprocess import Encoded, Encoding, preprocess
from megatron_hybrid.data.readers import require_file
from megatron_hybrid.data.tokenizers import TOKENIZERS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON-lines files")
    parser.add_argument("--output-prefix", type=Path, required=True, help="_KEY_document.bin and .idx are appended")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument(
        "--tokenizer-type",
        default="SentencePieceTokenizer",
        help=f"one of: {', '.join(TOKENIZERS)} (default: SentencePieceTokenizer)",
    )
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="the tokenizer's file")
    parser.add_argument("--prepend-bos", action="store_true", help="start each document with BOS")
    parser.add_argument("--append-eod", action="store_true", help="end each document with EOS")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for path in args.input:
        require_file(path)
    prefix = args.output_prefix.with_name(f"{args.output_prefix.name}_{args.json_key}_document")
    encoding = Encoding(args.tokenizer_type, args.tokenizer_model, args.json_key, args.prepend_bos, args.append_eod)
    size = sum(path.stat().st_size for path in args.input)
    began = time.perf_counter()

    def show(encoded: Encoded) -> None:
        bar.update(encoded.read_bytes)

    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        totals = preprocess(args.input, prefix, encoding, args.workers, show)
    seconds = time.perf_counter() - began
    empty = f", {totals.empty:,} empty ones left out" if totals.empty else ""
    print(
        f"{prefix}.bin: {totals.documents:,} documents{empty}, {totals.tokens:,} tokens, "
        f"{totals.read_bytes / seconds / 1e6:.1f} MB/s"
    )


if __name__ == "__main__":
    cli.run(main)
