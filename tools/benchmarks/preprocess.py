"""Speed of tools/preprocess_data.py against Megatron's own way and the bare tokenizer, on one corpus.

    python tools/benchmarks/preprocess.py [--library huggingface|sentencepiece] [--megabytes 100] [--workers 2]
    python tools/benchmarks/preprocess.py --memory      # peak memory on words that hardly repeat, 100 MB and 1 GB

Each method is a separate process, so all caches of words are cold; the corpus is dropped from the page cache
before each. "Megatron's way" is that of its preprocessing script: a pool of processes tokenizes one document at a time
with Megatron's tokenizer, and the parent writes through IndexedDatasetBuilder. "Bare tokenizer" encodes the texts in
batches on as many threads, with nothing read, parsed or written. The methods take turns; a run whose files are not
those of Megatron's, byte for byte, ends the benchmark.
"""

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_hybrid.cli import tool

TOOLS = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=["huggingface", "sentencepiece"], default="huggingface")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus (default: 100)")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of each (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--engine", default="auto", help="as preprocess_data's --tokenizer-engine (default: auto)")
    parser.add_argument("--memory", action="store_true", help="measure memory rather than speed")
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark_preprocess"), help="for all files")
    parser.add_argument("--json", type=Path, help="write the measurements here as well")
    parser.add_argument("--contestant", choices=["megatron", "tokenizer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.contestant:
        {"megatron": megatron_way, "tokenizer": bare_tokenizer}[args.contestant](args)
        return
    print(f"$ python {shlex.join(sys.argv)}\n{', '.join(f'{k} {v}' for k, v in versions().items())}")
    found = measure_memory(args) if args.memory else measure_speed(args)
    if args.json:
        args.json.write_text(json.dumps({"command": shlex.join(sys.argv), **versions(), **found}, indent=1) + "\n")


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    corpus = make_corpus(args.directory / f"corpus_{args.megabytes}.jsonl", args.megabytes * 1_000_000)
    model = make_tokenizer(args.directory, args.library, corpus)
    size = corpus.stat().st_size
    script = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
    ours = [sys.executable, str(TOOLS / "preprocess_data.py"), "--input", str(corpus), "--overwrite", "--append-eod"]
    ours += ["--output-prefix", str(args.directory / "ours"), "--tokenizer-model", str(model)]
    ours += ["--workers", str(args.workers), "--tokenizer-engine", args.engine]
    commands = {
        "Megatron's way": [*script, "--contestant", "megatron"],
        "this tool": ours,
        "bare tokenizer": [*script, "--contestant", "tokenizer"],
    }
    print(
        f"{size / 1e6:.1f} MB of JSON lines, {VOCAB_SIZE:,} ids, {args.library}, {args.workers} workers\n", flush=True
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(args.repeats):
        for name, command in commands.items():
            drop_from_page_cache(corpus)
            runs[name].append(measure(command, size))
            print(f"turn {turn + 1}, {name}: {runs[name][-1]['wall s']:.2f} s", flush=True)
        for ending in ("bin", "idx"):
            one, other = (args.directory / f"{who}_text_document.{ending}" for who in ("ours", "theirs"))
            if one.read_bytes() != other.read_bytes():
                raise ValueError(f"{one} is not {other}: these speeds are of different work. Nothing is reported.")
    print("\nthe files of both are the same, byte for byte\n")
    return {"corpus_bytes": size, "runs": runs, "medians": table(runs)}


def table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Print medians with the spread of the wall time; returns the medians."""
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    base = medians["Megatron's way"]
    print(
        f"{'':16}{'wall s':>8}{'(least-most)':>16}{'MB/s':>8}{'steady MB/s':>13}{'M tokens/s':>12}"
        f"{'CPU s':>8}{'peak MB':>9}{'time ratio':>12}{'steady ratio':>14}"
    )
    for name, m in medians.items():
        walls = [run["wall s"] for run in runs[name]]
        spread = f"{min(walls):.2f}-{max(walls):.2f}"
        print(
            f"{name:16}{m['wall s']:8.2f}{spread:>16}{m['MB/s']:8.1f}{m['steady MB/s']:13.1f}{m['M tokens/s']:12.2f}"
            f"{m['CPU s']:8.1f}{m['peak MB']:9.0f}{m['wall s'] / base['wall s']:12.3f}"
            f"{m['steady MB/s'] / base['steady MB/s']:14.2f}"
        )
    tool, bare = medians["this tool"], medians["bare tokenizer"]
    share = tool["steady MB/s"] / bare["steady MB/s"]
    print(f"\nthis tool, once at work, is at {share:.0%} of the bare tokenizer;")
    print(f"its first documents were there after {tool['first s']:.2f} s")
    return medians


def measure(command: list[str], size: int) -> dict[str, float]:
    """Run a command; wall and CPU time, and the peak memory of it and its children (files' pages counted once)."""
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    out, errors = process.communicate()
    wall = time.perf_counter() - began
    watcher.join()
    after = os.times()
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} failed:\n{errors[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    steady = re.findall(r"([\d.]+) MB/s once at work", out)
    tokens = re.findall(r"([\d,]+) tokens", out)
    first = re.findall(r"first documents after ([\d.]+) s", out)
    count = int(tokens[-1].replace(",", ""))
    return {
        "wall s": wall,
        "MB/s": size / wall / 1e6,
        "steady MB/s": float(steady[-1]) if steady else size / wall / 1e6,
        "M tokens/s": count / wall / 1e6,
        "CPU s": cpu,
        "peak MB": peak[0] / 1e6,
        "first s": float(first[-1]) if first else 0.0,
    }


def watch_memory(process: subprocess.Popen, peak: list[int]) -> None:
    import psutil

    top = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            found = [pages(one.pid) for one in (top, *top.children(recursive=True))]
            private = sum(resident - shared for resident, shared in found)
            peak[0] = max(peak[0], (private + max(shared for _, shared in found)) * os.sysconf("SC_PAGE_SIZE"))
        except (psutil.Error, OSError):
            pass
        time.sleep(0.02)


def pages(pid: int) -> tuple[int, int]:
    """Resident pages, and those of them that belong to files; cheap to read, unlike exact shares."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return int(resident), int(shared)


# --- contestants -----------------------------------------------------------------------------------


def megatron_way(args: argparse.Namespace) -> None:
    """Megatron's preprocessing, with the parts of the installed megatron-core."""
    import multiprocessing

    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    corpus = args.directory / f"corpus_{args.megabytes}.jsonl"
    model = make_tokenizer(args.directory, args.library, corpus)
    start_worker(args.library, str(model))
    prefix = args.directory / "theirs_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(_tokenizer.vocab_size))
    tokens = done = at_first = 0
    first = last = 0.0
    with multiprocessing.Pool(args.workers, start_worker, (args.library, str(model))) as pool, corpus.open() as lines:
        for ids, size in pool.imap(encode_line, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            tokens, done, last = tokens + len(ids), done + size, time.perf_counter()
            if not first:
                first, at_first = last, done
    builder.finalize(f"{prefix}.idx")
    print(f"{tokens:,} tokens, {(done - at_first) / (last - first) / 1e6:.2f} MB/s once at work")


_tokenizer: Any = None


def start_worker(library: str, model: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # tool.run's handler would keep a pool from ending its processes
    from megatron.core.tokenizers import MegatronTokenizer

    _tokenizer = MegatronTokenizer.from_pretrained(model, metadata_path={"library": library})


def encode_line(line: str) -> tuple[list[int], int]:
    return [*_tokenizer.tokenize(json.loads(line)["text"]), _tokenizer.eod], len(line.encode())


def bare_tokenizer(args: argparse.Namespace) -> None:
    """The engine that the tool uses, on texts that are in memory already."""
    import orjson

    from megatron_hybrid.data.encode import Encoding, make_encoders
    from megatron_hybrid.data.tokenizers import TokenizerSpec, guess_kind

    corpus = args.directory / f"corpus_{args.megabytes}.jsonl"
    model = make_tokenizer(args.directory, args.library, corpus)
    texts = [orjson.loads(line)["text"] for line in corpus.open("rb")]
    batches = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    encoding = Encoding(TokenizerSpec(guess_kind(model), model), engine=args.engine)
    encoders, _ = make_encoders(encoding, args.workers, texts[:8])
    for encoder in encoders:
        encoder.tokenizer.encode(texts[:1])  # what a library loads at its first call
    counts = [0] * args.workers

    def work(number: int) -> None:
        for batch in batches[number :: args.workers]:
            counts[number] += raw_encode(encoders[number].tokenizer, batch)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(args.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    print(f"{sum(counts):,} tokens, {corpus.stat().st_size / seconds / 1e6:.2f} MB/s once at work")


def raw_encode(tokenizer: Any, texts: list[str]) -> int:
    """The library's own call, and no more than the number of its tokens."""
    from megatron_hybrid.data.gigatokens import GigatokenTokenizer
    from megatron_hybrid.data.tokenizers import HuggingFaceTokenizer

    if isinstance(tokenizer, GigatokenTokenizer):
        return int(tokenizer._backend.encode_batch(texts, parallel=False).layout.offsets.data[-1])
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return sum(map(len, tokenizer._tokenizer.encode_batch_fast(texts, add_special_tokens=False)))
    return sum(map(len, tokenizer._model.encode(texts, num_threads=1, return_type="numpy")))


# --- memory ----------------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory on words of random letters, which no cache can hold."""
    base = make_corpus(args.directory / "corpus_100.jsonl", 100_000_000)
    model = make_tokenizer(args.directory, args.library, base)
    peaks = {}
    for megabytes in (100, 1000):
        corpus = args.directory / f"words_{megabytes}.jsonl"
        if not corpus.exists():
            write_lines(corpus, random_words(megabytes * 1_000_000))
        command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--input", str(corpus), "--overwrite"]
        command += ["--output-prefix", str(args.directory / "words"), "--tokenizer-model", str(model)]
        command += ["--workers", str(args.workers), "--tokenizer-engine", args.engine]
        found = measure(command, corpus.stat().st_size)
        peaks[megabytes] = found
        print(f"{megabytes:,} MB of unique words: peak {found['peak MB']:.0f} MB, {found['MB/s']:.1f} MB/s", flush=True)
    return {"memory": peaks}


def random_words(size: int) -> Iterator[str]:
    rng = random.Random(0)
    made = 0
    while made < size:
        text = " ".join(f"{rng.getrandbits(64):x}".translate(_LETTERS) for _ in range(200))
        made += len(text) + 13
        yield text


_LETTERS = str.maketrans("0123456789abcdef", "ghijklmnopabcdef")


# --- corpus and tokenizer --------------------------------------------------------------------------


def make_corpus(path: Path, size: int, roots: tuple[str, ...] = ("stdlib", "purelib")) -> Path:
    """JSON lines of the sources and texts in this Python's folders, in a fixed shuffled order, without repeats."""
    if path.exists():
        return path
    folders = [Path(sysconfig.get_paths().get(root, root)) for root in roots]
    endings = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh"}
    files = sorted({p for folder in folders for p in folder.rglob("*") if p.suffix in endings and p.is_file()})
    random.Random(1).shuffle(files)
    seen: set[str] = set()

    def texts() -> Iterator[str]:
        made = 0
        for file in files:
            try:
                text = file.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), 4200):
                part = text[start : start + 4200]
                if part not in seen and "\0" not in part and made < size:
                    seen.add(part)
                    made += len(json.dumps(part, ensure_ascii=False).encode()) + 12
                    yield part
        if made < size:
            raise ValueError(
                f"the texts in {', '.join(map(str, folders))} are {made / 1e6:.0f} MB; take fewer --megabytes."
            )

    return write_lines(path, texts())


def write_lines(path: Path, texts: Iterator[str]) -> Path:
    from megatron_hybrid.files import atomic_write

    with atomic_write(path) as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return path


def make_tokenizer(directory: Path, library: str, corpus: Path) -> Path:
    """A tokenizer of VOCAB_SIZE ids, made by tools/train_tokenizer.py of 15 MB of the corpus."""
    path = directory / ("sentencepiece.model" if library == "sentencepiece" else "huggingface")
    if not path.exists():
        command = [sys.executable, str(TOOLS / "train_tokenizer.py"), "--input", str(corpus), "--output", str(path)]
        command += ["--library", library, "--vocab-size", str(VOCAB_SIZE), "--sample-bytes", "15000000"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in ("megatron-core", "gigatoken", "tokenizers", "sentencepiece"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


if __name__ == "__main__":
    tool.run(main)
