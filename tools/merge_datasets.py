"""Merge data sets of Megatron, such as the shards of a run of preprocessing, into one.

    python tools/merge_datasets.py --input data/corpus_text_document.shard-* --output-prefix data/corpus_text_document

The documents stay in the order of --input, shards in their own. Corrupt, incomplete and
incompatible input is refused.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_hybrid.cli import tool


def parse_args() -> argparse.Namespace:
    parser = tool.data_parser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="data sets without their .bin/.idx, or globs of them",
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help=".bin, .idx and .json are appended")
    parser.add_argument("--dedup", choices=["exact"], help="keep the first of documents with the same tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from megatron_hybrid.data.merge import Merge, MergeJob

    job = MergeJob(tuple(args.input), args.output_prefix, args.dedup == "exact", args.overwrite, tuple(sys.argv))
    merge = Merge(job)
    for note in merge.notes:
        print(note)
    began = time.perf_counter()
    with tool.byte_bar(merge.bytes_to_read) as bar:
        manifest = merge.run(bar.update)
    seconds = time.perf_counter() - began
    left_out = sum(one.documents for one in merge.inputs) - manifest["documents"]
    duplicates = f", {left_out:,} duplicates left out" if left_out else ""
    print(
        f"{args.output_prefix}.bin: {len(merge.inputs):,} data sets, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens{duplicates}"
    )
    print(f"{seconds:.1f} s, {merge.bytes_to_read / seconds / 1e6:.0f} MB/s")


if __name__ == "__main__":
    tool.run(main)
