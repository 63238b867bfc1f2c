"""Corpora, tokenizers and readers for the tests of the corpus tools."""

import gzip
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_hybrid.data.encode import Encoding
from megatron_hybrid.data.indexed import IndexedWriter, bin_path, dtype_for, idx_path, read_index
from megatron_hybrid.data.merge import Merge, MergeJob
from megatron_hybrid.data.preprocess import Job, Preprocessing
from megatron_hybrid.data.tokenizers import TokenizerSpec
from tests.support.processes import ROOT

BYTES = TokenizerSpec("ByteTokenizer")
END = "<|end|>"


def lines(texts: Iterable[str]) -> bytes:
    """JSON lines of texts."""
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def corpus(count: int, seed: int = 3, most: int = 400) -> list[str]:
    """Texts of up to ``most`` words, no two alike."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma(x)", "naïve", "漢字", "  ", "\n\n", "1234"]
    return [f"{rng.random()} " + " ".join(rng.choices(words, k=rng.randrange(1, most))) for _ in range(count)]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of which about a third are copies of others."""
    choose = random.Random(seed)
    return [f"text {choose.randrange(count)} " + "ä b" * choose.choice([1, 40]) for _ in range(count)]


def write(path: Path, texts: list[str]) -> Path:
    """A corpus of texts in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(texts) // 7))
        return path
    content = "".join(text + "\n" for text in texts).encode() if ".txt" in path.suffixes else lines(texts)
    if path.suffix == ".gz":
        half = len(content) // 2  # two members, cut inside a line, as concatenated files have them
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    elif path.suffix == ".zst":
        import zstandard

        coder = zstandard.ZstdCompressor().compressobj()
        pieces = [content[i : i + 400] for i in range(0, len(content), 400)]  # blocks, as a longer file has them
        content = b"".join(coder.compress(p) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for p in pieces)
        content += coder.flush()
    path.write_bytes(content)
    return path


def train_bpe(texts: list[str], vocab_size: int, folder: Path, **config: str) -> Path:
    """A byte-level BPE of the Hugging Face tokenizers library, in a folder with its end of document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def preprocess(inputs: list[Path], prefix: Path, tokenizer: TokenizerSpec = BYTES, **flags) -> Preprocessing:
    """A whole run; flags are those of Job and of Encoding."""
    encoding = {name: flags.pop(name) for name in list(flags) if name in Encoding.__dataclass_fields__}
    job = Job(tuple(map(str, inputs)), prefix, Encoding(tokenizer, **encoding), **flags)
    run = Preprocessing(job)
    run.start()
    run.run()
    return run


def command(path: Path | str, prefix: Path, *flags: str) -> list[str]:
    """The command line of the tool: bytes with an end of document."""
    words = ["--input", path, "--output-prefix", prefix, "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, words), *flags]


def merge(inputs, prefix: Path, **flags) -> Merge:
    """A whole merge; flags are those of MergeJob."""
    run = Merge(MergeJob(tuple(map(str, inputs)), prefix, **flags))
    run.run()
    return run


def pair(prefix: Path) -> tuple[bytes, bytes]:
    """The bytes of a data set's two files."""
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def documents(prefix: Path) -> list[list[int]]:
    """The documents of a data set."""
    index = read_index(prefix)
    ids = np.fromfile(bin_path(prefix), index.dtype)
    return [list(map(int, part)) for part in np.split(ids, np.cumsum(index.lengths))[:-1]]


def texts_of(prefix: Path) -> list[str]:
    """The texts of a data set of bytes without marks."""
    return [bytes(ids).decode() for ids in documents(prefix)]


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_set(prefix: Path, lengths: list[int], documents: list[int] | None = None, dtype=np.uint16, seed=0) -> Path:
    """A data set of random ids without a manifest."""
    numbers = np.random.default_rng(seed)
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(dtype)) as writer:
        writer.add(numbers.integers(0, 60_000, sum(lengths)).astype(dtype), np.array(lengths, dtype=np.int64))
        writer.finish(None if documents is None else np.array(documents))
    prefix.with_name(prefix.name + ".lengths").unlink()
    return prefix


def random_tokens(folder: Path, documents: int, name: str = "text") -> Path:
    """Writes an indexed data set of random tokens below 99, the same each time; its prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder, name, dtype_for(100)) as writer:
        generator = np.random.default_rng(0)
        for length in generator.integers(20, 200, documents):
            writer.add(generator.integers(0, 99, length).astype(np.uint16), np.array([length]))
        writer.finish()
    return folder / name
