"""Show the content of a Megatron data set, and verify it.

    python tools/inspect_dataset.py data/corpus_text_document
    python tools/inspect_dataset.py data/corpus_text_document --documents 0 3:6 -1
    python tools/inspect_dataset.py data/corpus_text_document --verify

--verify reads everything and exits with 1 if something is wrong.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from megatron_hybrid.cli import tool


def parse_args() -> argparse.Namespace:
    parser = tool.data_parser(__doc__)
    parser.add_argument("prefix", help="the data set without its .bin or .idx")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="plot the lengths of documents")
    show = parser.add_argument_group("documents")
    show.add_argument(
        "--documents",
        nargs="+",
        metavar="N",
        help="print these: numbers, -1 for the last, ranges such as 3:6 (from the end: --documents=-3:)",
    )
    show.add_argument("--tokens", action="store_true", help="print them as token ids")
    show.add_argument("--max-chars", type=int, default=2000, help="characters of each; 0 for all (default: 2000)")
    check = parser.add_argument_group("checks")
    check.add_argument("--verify", action="store_true", help="check everything against its index and manifest")
    check.add_argument("--verify-inputs", action="store_true", help="check whether its input files are unchanged")
    tool.add_tokenizer_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prefix = Path(re.sub(r"\.(bin|idx)$", "", args.prefix))
    if args.json and (args.documents or args.verify or args.verify_inputs):
        raise ValueError("--json prints the figures; leave out --documents, --verify and --verify-inputs.")
    if args.max_chars < 0:
        raise ValueError(f"--max-chars {args.max_chars}: a number of characters, or 0 for all.")
    wrong = []
    if args.verify:
        wrong += verify(prefix)
    if args.verify_inputs:
        wrong += verify_inputs(prefix)
    if args.documents:
        documents(prefix, args)
    if args.histogram or not (args.verify or args.verify_inputs or args.documents):
        figures(prefix, args)
    if wrong:
        checks = "check" if len(wrong) == 1 else "checks"
        print(f"{prefix}: {len(wrong):,} {checks} failed:", *wrong, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def figures(prefix: Path, args: argparse.Namespace) -> None:
    from megatron_hybrid.data.inspection import draw_histogram, statistics, table

    found = statistics(prefix)
    if args.histogram:
        draw_histogram(found, args.histogram)
        print(f"drew {args.histogram}", file=sys.stderr)
    print(json.dumps(found, indent=1) if args.json else table(found))


def documents(prefix: Path, args: argparse.Namespace) -> None:
    from megatron_hybrid.data.inspection import parse_numbers, read_whole_index, show_documents, tokenizer_of
    from megatron_hybrid.data.manifest import read_manifest

    index = read_whole_index(prefix)
    numbers = parse_numbers(args.documents, len(index.documents) - 1)
    given = tool.tokenizer_spec(args) if args.tokenizer_type or args.tokenizer_model else None
    tokenizer = None if args.tokens else tokenizer_of(read_manifest(prefix), given)
    for text in show_documents(prefix, index, numbers, tokenizer, args.max_chars):
        print(text)


def verify(prefix: Path) -> list[str]:
    from tqdm import tqdm

    from megatron_hybrid.data.indexed import bin_path
    from megatron_hybrid.data.verify import verify as checks

    wrong = []
    path = bin_path(prefix)
    show = tqdm.write if sys.stderr.isatty() else print  # write goes around a bar that is shown
    with tool.byte_bar(path.stat().st_size if path.is_file() else 0) as bar:
        for name, fault, note in checks(prefix, bar.update):
            found = f"FAILED: {fault}" if fault else f"ok ({note})" if note else "ok"
            show(f"{name:<44} {found}")
            wrong += [f"{name}: {fault}"] if fault else []
    return wrong


def verify_inputs(prefix: Path) -> list[str]:
    from megatron_hybrid.data.manifest import read_manifest
    from megatron_hybrid.data.verify import verify_inputs as checks

    said = read_manifest(prefix)
    if said is None:
        raise ValueError(f"--verify-inputs: {prefix} has no manifest that names its inputs.")
    wrong = []
    for name, state in checks(said):
        print(f"{state:<8} {name}", flush=True)
        wrong += [f"input {name} has changed"] if state == "changed" else []
    return wrong


if __name__ == "__main__":
    tool.run(main)
