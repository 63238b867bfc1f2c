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

from megatron_hybrid.cli import tool

BEGAN = time.perf_counter()


def parse_args() -> argparse.Namespace:
    parser = tool.data_parser(__doc__)
    tool.add_input_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output-prefix", type=Path, required=True, help="_KEY_document.bin, .idx and .json are appended")
    out.add_argument("--resume", action="store_true", help="continue an interrupted run, if there is one")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier output, or an unfinished one")
    out.add_argument("--shard", default="0/1", metavar="I/N", help="process the I-th of N parts of the input, from 0")
    out.add_argument(
        "--save-every", type=float, default=10, help="seconds between flushes of the state to disk (default: 10)"
    )
    tool.add_tokenizer_flags(parser)
    doc = parser.add_argument_group("documents")
    doc.add_argument("--prepend-bos", action="store_true", help="start each document with BOS")
    doc.add_argument("--append-eod", action="store_true", help="end each document with EOS")
    doc.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a bad record: stop, or skip it and list it in PREFIX_KEY_document.skipped.jsonl",
    )
    doc.add_argument("--dedup", choices=["exact"], help="keep the first of documents with the same tokens")
    doc.add_argument("--min-chars", type=int, help="drop shorter documents")
    doc.add_argument("--max-chars", type=int, help="drop longer documents")
    doc.add_argument("--min-alphanumeric", type=float, help="minimum share of letters and digits, such as 0.6")
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
    from megatron_hybrid.data.preprocess_report import Speed, lines, parse_shard, work

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
        shard=parse_shard(args.shard),
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
        print(work(run, args.workers), flush=True)
    try:
        with tool.byte_bar(run.bytes_left()) as bar:
            speed = Speed(bar, BEGAN)
            manifests = run.run(speed.count)
    except BaseException:
        if run.resumable:
            print(f"{run.documents:,} documents are kept; the same command with --resume continues", file=sys.stderr)
        raise
    print(*lines(run, manifests, speed), sep="\n")


if __name__ == "__main__":
    tool.run(main)
