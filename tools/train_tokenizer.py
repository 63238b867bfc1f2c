"""Train a SentencePiece tokenizer (BPE with byte fallback) on JSON lines.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output tok.model

Megatron loads it with --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hybrid.data import cli
from megatron_hybrid.data.readers import read_texts, require_file
from megatron_hybrid.data.tokenizers import train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON-lines files")
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=64_000_000,
        help="train on the first that many bytes (default: 64,000,000)",
    )
    args = parser.parse_args()
    for path in args.input:
        require_file(path)
    used = train_sentencepiece(
        read_texts(args.input, args.json_key),
        args.vocab_size,
        args.output,
        args.sample_bytes,
    )
    print(f"{args.output}: {args.vocab_size:,} ids, trained on {used:,} bytes of text")


if __name__ == "__main__":
    cli.run(main)
