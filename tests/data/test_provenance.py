"""Data of another tokenizer: what a run refuses, what it lets through, and what it says it cannot know."""

import json
import random
from pathlib import Path

import pytest

from megatron_hybrid.data import provenance
from megatron_hybrid.data.manifest import manifest_path, read_manifest
from megatron_hybrid.data.provenance import RunTokenizer
from megatron_hybrid.data.tokenizers import TokenizerSpec
from tests.data.corpora import BYTES, preprocess, train_bpe, write

WORDS = ("the", "of", "cat", "dog", "sat", "ran", "on", "in", "mat", "sun")
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(60)]


def train_sentencepiece(texts, vocab_size, path):
    import sentencepiece

    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=stream,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return TokenizerSpec("SentencePieceTokenizer", path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data sets by name, and the specs of the tokenizers: two SentencePiece models, a Hugging Face folder, bytes."""
    folder = tmp_path_factory.mktemp("provenance")
    corpus = write(folder / "corpus.jsonl", TEXTS)
    specs = {
        "sp": train_sentencepiece(TEXTS, 290, folder / "a.model"),
        "other sp": train_sentencepiece(TEXTS, 280, folder / "b.model"),
        "hf": TokenizerSpec("HuggingFaceTokenizer", train_bpe(TEXTS, 300, folder / "hf")),
        "bytes": BYTES,
    }
    prefixes = {}
    for name, spec in specs.items():
        run = preprocess([corpus], folder / "data" / name.replace(" ", "_"), spec, append_eod=True)
        prefixes[name] = str(run.prefixes[0])
    run = preprocess([corpus], folder / "data" / "without_eod", specs["sp"])
    return {**prefixes, "sp without EOD": str(run.prefixes[0])}, specs


def refusal(*args) -> str:
    with pytest.raises(ValueError) as error:
        provenance.check(*args)
    return str(error.value)


def test_a_run_with_the_datas_tokenizer_passes(made, tmp_path):
    prefixes, specs = made
    for name in ("sp", "other sp", "hf"):
        assert provenance.check([prefixes[name]] * 2, RunTokenizer(specs[name], separates=True)) == []
    # wherever the file lies, and by whichever of Megatron's names for it
    copy = tmp_path / "copy.model"
    copy.write_bytes(specs["sp"].model.read_bytes())
    for kind in ("Llama2Tokenizer", "GPTSentencePieceTokenizer"):
        assert provenance.check([prefixes["sp"]], RunTokenizer(TokenizerSpec(kind, copy))) == []


def test_another_tokenizer_is_refused_with_both_names(made):
    prefixes, specs = made
    for data, run in (("sp", "other sp"), ("sp", "hf"), ("hf", "sp"), ("bytes", "sp")):
        text = refusal([prefixes[run], prefixes[data]], RunTokenizer(specs[run]))
        entry = read_manifest(Path(prefixes[data]))["tokenizer"]
        own = read_manifest(Path(prefixes[run]))["tokenizer"]
        assert text.startswith(f"{prefixes[data]} was written with another tokenizer")
        for part in (entry, own):
            model = f"{part['model']} " if part["model"] else ""
            assert f"{part['type']} {model}({part['fingerprint'][7:15]})" in text
        assert f"{prefixes[data]}.json" in text
    assert "Give --tokenizer-type NullTokenizer --vocab-size 258, or" in text


def test_bytes_are_read_with_the_null_tokenizer(made):
    prefixes, _ = made

    def null(vocab_size, **more):
        return RunTokenizer(TokenizerSpec("NullTokenizer", vocab_size=vocab_size), **more)

    data = [prefixes["bytes"]]
    assert provenance.check(data, null(258, separates=True, masks_eod=True)) == []
    assert provenance.check(data, null(1000)) == []
    assert "--vocab-size 257 is too small" in (text := refusal(data, null(257))) and "Give --vocab-size 258" in text
    for flags, name in (({"separates": True}, "--reset-attention-mask"), ({"masks_eod": True}, "--eod-mask-loss")):
        text = refusal(data, null(300, **flags))
        assert text.startswith(f"{name} looks for token 299") and "end with token 257" in text
        assert "--null-tokenizer-eod-id 257" in text
        assert provenance.check(data, null(300, null_eod_id=257, **flags)) == []
    # text of any tokenizer, too
    assert provenance.check([prefixes["sp"]], null(290)) == []
    assert "290 tokens" in refusal([prefixes["sp"]], null(289))


def test_documents_without_an_end_cannot_be_told_apart(made):
    prefixes, specs = made
    data = [prefixes["sp without EOD"]]
    assert provenance.check(data, RunTokenizer(specs["sp"], masks_eod=True)) == []
    for spec in (specs["sp"], TokenizerSpec("NullTokenizer", vocab_size=290), TokenizerSpec("HuggingFaceTokenizer")):
        text = refusal(data, RunTokenizer(spec, separates=True))
        assert "append_eod: false" in text and "--append-eod, or drop the flag" in text and data[0] in text


def test_another_end_of_document_of_the_same_tokenizer_is_refused(made, tmp_path):
    prefixes, specs = made
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((specs["hf"].model / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    moved = TokenizerSpec("HuggingFaceTokenizer", folder)
    assert provenance.check([prefixes["hf"]], RunTokenizer(moved)) == []
    text = refusal([prefixes["hf"]], RunTokenizer(moved, separates=True))
    assert "--reset-attention-mask looks for token 1" in text and "end with token 0" in text


def test_what_cannot_be_compared_is_said_once(made, tmp_path):
    prefixes, _ = made
    hub = RunTokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path / "nobody" / "model"))
    notes = provenance.check([prefixes["sp"], prefixes["hf"]], hub)
    assert len(notes) == 1 and "name on a hub" in notes[0] and "local folder" in notes[0]
    other = provenance.check([prefixes["sp"]], RunTokenizer(TokenizerSpec("GPT2BPETokenizer")))
    assert len(other) == 1 and "GPT2BPETokenizer has no fingerprint" in other[0]


def test_without_a_manifest_nothing_is_compared_or_loaded(made, tmp_path):
    prefixes, specs = made
    for end in (".bin", ".idx"):
        (tmp_path / f"bare{end}").write_bytes(Path(prefixes["sp"] + end).read_bytes())
    nowhere = RunTokenizer(TokenizerSpec("SentencePieceTokenizer", tmp_path / "none.model"), separates=True)
    assert provenance.check([str(tmp_path / "bare")], nowhere) == []
    text = refusal([str(tmp_path / "bare"), prefixes["sp"]], nowhere)
    assert "none.model does not exist" in text and f"{prefixes['sp']}.json" in text
    manifest_path(tmp_path / "bare").write_text("{}")
    assert "bare.json is not a manifest" in refusal([str(tmp_path / "bare")], nowhere)
