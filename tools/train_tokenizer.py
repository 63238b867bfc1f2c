"""Train a tokenizer on a sample of a corpus: SentencePiece, or Hugging Face byte-level BPE.

    python tools/train_tokenizer.py --input corpus/ more/*.jsonl.gz --vocab-size 32000 --output my_tokenizer.model
    python tools/train_tokenizer.py --input corpus/ --vocab-size 32000 --library huggingface --output my_tokenizer

SentencePiece's is a file, Hugging Face's a folder. The last line says how tools/preprocess_data.py and training use it.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_hybrid.cli import tool


def parse_args() -> argparse.Namespace:
    parser = tool.data_parser(__doc__)
    tool.add_input_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, required=True, help="file (SentencePiece) or folder (Hugging Face)")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier tokenizer")
    kind = parser.add_argument_group("tokenizer")
    kind.add_argument("--vocab-size", type=int, required=True, help="number of ids, with those of special tokens")
    kind.add_argument("--library", choices=["sentencepiece", "huggingface"], default="sentencepiece")
    kind.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="unigram: SentencePiece only")
    kind.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        help="SentencePiece: rare characters and line ends become bytes (default), else the unknown token",
    )
    kind.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each digit is a token (default); else SentencePiece merges digits freely, Hugging Face up to three",
    )
    kind.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="tokens that are never split")
    kind.add_argument(
        "--normalization",
        default="identity",
        help="SentencePiece: identity (default), nfkc, nmt_nfkc, nfkc_cf, nmt_nfkc_cf; Hugging Face: identity, nfc, "
        "nfkc. With others than identity, ids do not restore the exact text",
    )
    sample = parser.add_argument_group("sample")
    sample.add_argument(
        "--sample-bytes",
        type=int,
        default=64_000_000,
        help="UTF-8 bytes to train on, documents drawn from the whole input (default: 64,000,000); training takes 5 "
        "(Hugging Face), 13 (SentencePiece's BPE) or 30 (unigram) times as much memory",
    )
    sample.add_argument("--seed", type=int, default=1234, help="seed of the sample (default: 1234)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from megatron_hybrid.data.documents import read_texts
    from megatron_hybrid.data.sources import Segment, find_sources
    from megatron_hybrid.data.tokenizer_training import Settings, check_output, draw_sample, train, write

    settings = Settings(
        args.vocab_size,
        args.library,
        args.model_type,
        args.byte_fallback,
        args.split_digits,
        tuple(args.special_tokens),
        args.normalization,
    )
    settings.check()
    check_output(args.output, args.library, args.overwrite)
    keys = tool.text_keys(args)
    if len(keys) > 1:
        raise ValueError(f"--text-key {' '.join(keys)}: a tokenizer is trained on the texts of one key.")
    sources, passed_over = find_sources(args.input, args.input_format)
    tool.print_passed_over(passed_over)
    with tool.byte_bar(sum(source.size for source in sources), "reading") as bar:
        texts = read_texts([Segment(source) for source in sources], keys[0], args.text_split, bar.update)
        sample = draw_sample(texts, args.sample_bytes, args.seed)
    drawn = f"{sample.size:,} bytes of text, {len(sample.texts):,} of {sample.documents:,} documents"
    print(f"training on {drawn}", flush=True)
    began = time.perf_counter()
    with tool.default_signals():
        files = train(settings, sample, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - began
    write(files, args.output, args.library, args.overwrite)
    kind = "HuggingFaceTokenizer" if args.library == "huggingface" else "SentencePieceTokenizer"
    print(
        f"{args.output}: {args.vocab_size:,} ids, trained on {drawn}, in {seconds:.1f} s; preprocess_data and training "
        f"take it as --tokenizer-type {kind} --tokenizer-model {args.output}"
    )


if __name__ == "__main__":
    tool.run(main)
