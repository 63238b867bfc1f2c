"""Build a small corpus from the sources and docstrings of Python's standard library.

    python tools/build_stdlib_corpus.py --output runs/quickstart/data

writes DIR/corpus.jsonl, one {"text": ...} a line, the same on every run of one Python release.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.data.stdlib_corpus import documents
from megatron_hybrid.files import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for corpus.jsonl")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="directory of the library (default: that of this Python)",
    )
    args = parser.parse_args()
    texts = documents(args.source)
    path = args.output / "corpus.jsonl"
    with atomic_write(path) as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}).encode() + b"\n")
    characters = sum(map(len, texts))
    print(f"{path}: {len(texts):,} documents, {characters:,} characters, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    tool.run(main)
