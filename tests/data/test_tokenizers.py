"""Tokenizers of preprocessing against the libraries' and Megatron's own, and gigatoken against Hugging Face's."""

import base64
import io
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.data.encode import Encoding, make_encoders, mark
from megatron_hybrid.data.gigatokens import UNLIKE, GigatokenTokenizer, first_difference, hard_texts
from megatron_hybrid.data.stdlib_corpus import documents
from megatron_hybrid.data.tokenizer_training import _WORDS
from megatron_hybrid.data.tokenizers import HuggingFaceTokenizer, TokenizerSpec, guess_kind, load_tokenizer, split

from .corpora import BYTES, END, train_bpe

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
ODD = [
    "  two  spaces\n\ttab\r\n\n\n    漢字 ünï 🐍 1234 end \n",
    " leading",
    "trailing ",
    "a  b",
    f"x{END}y",
    "<s></s>",
]


@pytest.fixture(scope="module")
def texts():
    """Some documents of real text and code."""
    return documents(LIBRARY / "json") + documents(LIBRARY / "asyncio")


@pytest.fixture(scope="module")
def sentencepiece_model(texts, tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "tok.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    return train_bpe(texts, 900, tmp_path_factory.mktemp("bpe") / "tok", bos_token="<|pad|>")


@pytest.fixture(scope="module")
def tiktoken_vocabulary(texts, tmp_path_factory):
    """256 bytes and some words, as Megatron's file has them."""
    words = sorted({word for text in texts for word in text.split()})[:200]
    tokens = [bytes([i]) for i in range(256)]
    tokens += [token for word in words for token in (word[:2].encode(),) if len(token) > 1 and token not in tokens][:50]
    tokens = list(dict.fromkeys(tokens))
    path = tmp_path_factory.mktemp("tiktoken") / "vocab.json"
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": t.decode(errors="replace")}
        for i, t in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path, len(tokens)


def ids_of(tokenizer, texts):
    ids, lengths = tokenizer.encode(texts)
    return [list(map(int, part)) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_sentencepiece_is_megatrons(sentencepiece_model, texts):
    from megatron.core.tokenizers import MegatronTokenizer

    from megatron_hybrid.training.megatron_tokenizer import compare

    theirs = MegatronTokenizer.from_pretrained(str(sentencepiece_model), metadata_path={"library": "sentencepiece"})
    ours = load_tokenizer(TokenizerSpec("SentencePieceTokenizer", sentencepiece_model))
    assert (theirs.vocab_size, theirs.bos, theirs.eod) == (ours.vocab_size, ours.bos_id, ours.eod_id)
    samples = [*texts[:10], *ODD]
    assert ids_of(ours, samples) == [theirs.tokenize(text) for text in samples]
    assert [ours.decode(ids) for ids in ids_of(ours, samples)] == samples
    assert ours.decode([1, *ids_of(ours, ["a"])[0], 2]) == "<s>a</s>"
    spec = TokenizerSpec("SentencePieceTokenizer", sentencepiece_model)
    compare("data/d", spec, theirs)
    more = MegatronTokenizer.from_pretrained(
        str(sentencepiece_model), metadata_path={"library": "sentencepiece"}, legacy=True, special_tokens=["<new>"]
    )
    with pytest.raises(ValueError, match="not the one that wrote data/d: it has 601 tokens, and there 600. Drop flags"):
        compare("data/d", spec, more)


def test_hugging_face_is_megatrons(bpe, texts):
    from megatron.core.tokenizers import MegatronTokenizer

    theirs = MegatronTokenizer.from_pretrained(
        str(bpe), metadata_path={"library": "huggingface"}, include_special_tokens=False
    )
    ours = load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", bpe))
    assert (theirs.vocab_size, theirs.bos, theirs.eod) == (ours.vocab_size, ours.bos_id, ours.eod_id) == (900, 1, 0)
    samples = [*texts[:10], *ODD]
    assert ids_of(ours, samples) == [theirs.tokenize(text) for text in samples]
    assert [ours.decode(ids) for ids in ids_of(ours, samples)] == samples


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_is_megatrons(tiktoken_vocabulary, texts, pattern):
    from megatron.core.tokenizers import MegatronTokenizer

    path, count = tiktoken_vocabulary
    size = count + 20
    theirs = MegatronTokenizer.from_pretrained(
        str(path), metadata_path={"library": "tiktoken"}, pattern=pattern, vocab_size=size, num_special_tokens=20
    )
    spec = TokenizerSpec("TikTokenizer", path, pattern=pattern, num_special_tokens=20, vocab_size=size)
    ours = load_tokenizer(spec)
    assert (theirs.vocab_size, theirs.bos, theirs.eod) == (ours.vocab_size, ours.bos_id, ours.eod_id)
    samples = [*texts[:10], *ODD]
    assert ids_of(ours, samples) == [theirs.tokenize(text) for text in samples]
    assert [ours.decode(ids) for ids in ids_of(ours, samples)] == samples
    other = TokenizerSpec(
        "TikTokenizer", path, pattern="v1" if pattern == "v2" else "v2", num_special_tokens=20, vocab_size=size
    )
    assert load_tokenizer(other).fingerprint != ours.fingerprint


def test_bytes_are_read_with_the_null_tokenizer():
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    ours = load_tokenizer(BYTES)
    null = NullTokenizer(ours.vocab_size)
    assert (null.vocab_size, null.eod) == (ours.vocab_size, ours.eod_id)
    assert ids_of(ours, ODD) == [list(text.encode()) for text in ODD]
    assert ours.decode([256, 104, 105, 257]) == "<s>hi</s>"


def test_the_fingerprint_follows_the_ids_and_not_the_file(bpe, tmp_path, texts):
    config = json.loads((bpe / "tokenizer.json").read_text())
    original = load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", bpe)).fingerprint

    def changed(**parts):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(config | parts, indent=3))
        return load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", path)).fingerprint

    merges = [m.split(" ") if isinstance(m, str) else m for m in config["model"]["merges"]]
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    assert changed(model=config["model"] | {"merges": merges}, truncation=truncation) == original
    short = HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path / "tokenizer.json"))
    assert len(ids_of(short, ["word " * 20])[0]) > 5, "a file's truncation is for inference"
    assert changed(normalizer={"type": "NFKC"}) != original
    assert changed(model=config["model"] | {"merges": merges[::-1]}) != original


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("SentencePieceTokenizer", "absent.model", None, "absent.model does not exist; make one with"),
        ("SentencePieceTokenizer", "a.model", b"hello", "not a SentencePiece model"),
        ("HuggingFaceTokenizer", "folder", None, "does not exist"),
        ("HuggingFaceTokenizer", "tokenizer.json", b'{"model": 1}', "not a Hugging Face tokenizer"),
        ("TikTokenizer", "v.json", b"{}", "not a tiktoken vocabulary of Megatron"),
        ("TikTokenizer", "v.json", b"[]", "has 0 tokens, but --vocab-size 131072"),
        ("BertTokenizer", "a", b"", "'BertTokenizer' is not supported; the types are: SentencePieceTokenizer"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, kind, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(TokenizerSpec(kind, tmp_path / name))
    assert message in str(error.value)


def test_sentencepiece_that_drops_spaces_is_refused(texts, tmp_path):
    import sentencepiece

    model = io.BytesIO()  # sentencepiece's defaults drop repeated spaces
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts).splitlines()), model_writer=model, vocab_size=300, minloglevel=2
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="drops repeated spaces"):
        load_tokenizer(TokenizerSpec("SentencePieceTokenizer", tmp_path / "a.model"))


def test_the_kind_is_guessed_from_the_name(tmp_path):
    assert guess_kind(tmp_path) == guess_kind(Path("x/tokenizer.json")) == "HuggingFaceTokenizer"
    assert guess_kind(Path("a.model")) == "SentencePieceTokenizer"
    with pytest.raises(ValueError, match="give --tokenizer-type"):
        guess_kind(Path("vocab.json"))


# --- gigatoken -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(bpe):
    reference = HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", bpe))
    return reference, GigatokenTokenizer(reference)


def test_gigatoken_gives_the_same_ids(pair, texts):
    reference, fast = pair
    hard = hard_texts(reference.added_tokens())
    assert len(hard) > 300 and any(END in text for text in hard)
    assert first_difference(reference, fast, [*texts, *hard, *ODD]) is None


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(max_size=60) | st.text("aA1 \n'!é中🙂<|end>", max_size=40), min_size=1, max_size=8))
def test_gigatoken_gives_the_same_ids_for_any_text(pair, found):
    assert first_difference(*pair, found) is None


@pytest.mark.parametrize("rule", ["GPT-2", "Qwen 2"])
def test_every_character_but_the_listed_ones_is_of_the_same_kind_in_both(bpe, tmp_path, rule):
    """gigatoken's and Hugging Face's Unicode tables; the listed characters go to the slower library.

    A vocabulary of bytes and of each byte with "!" shows where words begin and end.
    """
    config = json.loads((bpe / "tokenizer.json").read_text())
    alphabet = [token for token in config["model"]["vocab"] if len(token) == 1]
    config["model"]["vocab"] = {token: i for i, token in enumerate([*alphabet, *(a + "!" for a in alphabet)])}
    config["model"]["merges"] = [[token, "!"] for token in alphabet]
    config["added_tokens"] = []
    if rule == "Qwen 2":
        split_words = {"type": "Split", "pattern": {"Regex": _WORDS.format(digits=r"\p{N}")}, "behavior": "Isolated"}
        steps = [split_words | {"invert": False}, config["pre_tokenizer"] | {"use_regex": False}]
        config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    reference = HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path))
    fast = GigatokenTokenizer(reference)

    def unequal(codes, size):
        """Those parts of some code points, of a size, to which the two give other ids."""
        parts = [codes[i : i + size] for i in range(0, len(codes), size)]
        texts = [" ".join(f"x{chr(code)}! 1{chr(code)}!" for code in part) for part in parts]
        pairs = zip(parts, split(reference.encode(texts)), split(fast._encode(texts)), strict=True)
        return [code for part, a, b in pairs if not np.array_equal(a, b) for code in part]

    # Planes 4 to 13, 15 and 16 hold no characters yet, or private ones: a sample of them.
    ranges = (range(1, 0xD800), range(0xE000, 0x40000), range(0x40000, 0x110000, 97), range(0xE0000, 0xE0200))
    codes = sorted({code for part in ranges for code in part})
    different = set(unequal(unequal(codes, 100), 1))
    ends = [[int(end, 16) for end in part.split("-")] for part in UNLIKE.split()]
    unlike = {code for first, *last in ends for code in range(first, (last or [first])[0] + 1)}
    assert different == unlike, "gigatoken or tokenizers has other tables now: list these characters in UNLIKE"
    assert first_difference(reference, fast, [f"x{chr(code)}! 1{chr(code)}!" for code in sorted(unlike)]) is None


def test_a_difference_is_found_and_answered(bpe, texts, tmp_path):
    """Another merge order stands for a fault of the fast library."""
    config = json.loads((bpe / "tokenizer.json").read_text())
    config["model"]["merges"] = config["model"]["merges"][::-1]
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(config))
    reference = HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", bpe))
    wrong = GigatokenTokenizer(HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", other)))
    assert first_difference(reference, wrong, ["", *texts[:3]]) == texts[0]


def test_the_memory_limit_makes_a_new_tokenizer_and_the_same_ids(bpe, monkeypatch, texts):
    from megatron_hybrid.data import gigatokens

    reference = HuggingFaceTokenizer(TokenizerSpec("HuggingFaceTokenizer", bpe))
    monkeypatch.setattr(gigatokens, "_CHECK_BYTES", 1000)
    fast = GigatokenTokenizer(reference, memory_limit=-(1 << 40))
    first = fast._backend
    assert first_difference(reference, fast, texts[:5]) is None and fast._backend is not first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"byte_fallback": True}}, "not byte-level BPE"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level BPE"),
    ],
)
def test_auto_falls_back_and_says_why(bpe, tmp_path, change, reason):
    config = json.loads((bpe / "tokenizer.json").read_text())
    for name, value in change.items():
        config[name] = (config[name] | value) if name == "model" else value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    spec = TokenizerSpec("HuggingFaceTokenizer", path)
    encoders, line = make_encoders(Encoding(spec), 2, [])
    assert isinstance(encoders[0].tokenizer, HuggingFaceTokenizer) and reason in line
    with pytest.raises(ValueError, match=f"--tokenizer-engine gigatoken: .*{reason}"):
        make_encoders(Encoding(spec, engine="gigatoken"), 1, [])


def test_each_thread_has_a_tokenizer_of_its_own(bpe, sentencepiece_model):
    for spec in (
        TokenizerSpec("HuggingFaceTokenizer", bpe),
        TokenizerSpec("SentencePieceTokenizer", sentencepiece_model),
    ):
        encoders, _ = make_encoders(Encoding(spec), 3, [])
        assert len({id(encoder.tokenizer) for encoder in encoders}) == 3
    assert "gigatoken" in make_encoders(Encoding(TokenizerSpec("HuggingFaceTokenizer", bpe)), 1, ["a"])[1]


def test_a_mark_that_the_tokenizer_lacks_is_refused(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    bare = TokenizerSpec("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(ValueError, match="--append-eod: the tokenizer defines no EOS token; .* --eod-token"):
        make_encoders(Encoding(bare, append_eod=True), 1, [])
    with pytest.raises(ValueError, match="--eod-token </s>: the tokenizer has no such token"):
        load_tokenizer(TokenizerSpec("HuggingFaceTokenizer", tmp_path, eod_token="</s>"))
    named = TokenizerSpec("HuggingFaceTokenizer", tmp_path, eod_token=END)
    assert make_encoders(Encoding(named, append_eod=True), 1, [])[0][0].tail == [0]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=6), st.booleans(), st.booleans())
def test_marks_stand_at_both_ends(parts, head, tail):
    ids = np.array([i for part in parts for i in part], dtype=np.uint32)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    heads, tails = [50] * head, [60] * tail
    found = mark(ids, lengths, heads, tails, np.dtype(np.uint16))
    assert found.ids.dtype == np.uint16
    expected = [heads + part + tails for part in parts]
    assert found.ids.tolist() == sum(expected, []) and found.lengths.tolist() == [len(part) for part in expected]
