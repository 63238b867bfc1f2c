"""Folders of Hugging Face tokenizers: the ids, special tokens and size that Megatron's own tokenizer has of them."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_hybrid.data.gigatokens import GigatokenTokenizer, hard_texts
from megatron_hybrid.data.tokenizer_training import _WORDS
from megatron_hybrid.data.tokenizers import TokenizerSpec, load_tokenizer, split

WORDS = ["alpha", "beta", "gamma", "delta", "tree", "river", "stone", "night"]
MARKS = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
KINDS = ["Llama 3", "GPT-2", "WordPiece", "Unigram", "Llama 2"]


def texts(count=60):
    """Indentation, words and long numbers, on which rules for splitting differ."""
    r = random.Random(0)
    lines = (
        f"{'    ' * r.randrange(4)}{r.choice(WORDS)} = {r.randrange(10 ** r.randrange(1, 10))}\n\n"
        for _ in iter(int, 1)
    )
    return ["".join(next(lines) for _ in range(40)) for _ in range(count)]


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of each algorithm and splitting rule."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    given = {"vocab_size": 700, "special_tokens": MARKS, "show_progress": False}
    if kind in ("Llama 3", "GPT-2"):
        made = Tokenizer(models.BPE())
        rule = pre_tokenizers.Split(Regex(_WORDS.format(digits=r"\p{N}{1,3}")), "isolated")
        steps = [rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        of_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.pre_tokenizer = pre_tokenizers.Sequence(steps) if kind == "Llama 3" else of_gpt2
        made.decoder, trainer = decoders.ByteLevel(), trainers.BpeTrainer(initial_alphabet=alphabet, **given)
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(**given)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **given)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
        marks = [*MARKS, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(**given | {"special_tokens": marks})
    made.train_from_iterator(texts(), trainer)
    config = json.loads(made.to_str())
    if kind == "Llama 2":  # its bytes are tokens of the vocabulary that no text is split at
        config["added_tokens"] = config["added_tokens"][: len(MARKS)]
    # as published: a Unigram model that was just trained decides between equally likely splits otherwise than its file
    return Tokenizer.from_str(json.dumps(config))


@pytest.fixture(scope="module")
def originals():
    return {kind: trained(kind) for kind in KINDS}


def folder(path: Path, tokenizer: Tokenizer, config: dict, **files) -> TokenizerSpec:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    for name, content in {"tokenizer_config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return TokenizerSpec("HuggingFaceTokenizer", path)


def megatrons(spec: TokenizerSpec, **settings):
    from megatron.core.tokenizers import MegatronTokenizer

    library = {"library": "huggingface"}
    return MegatronTokenizer.from_pretrained(
        str(spec.model), metadata_path=library, include_special_tokens=False, **settings
    )


def compared(spec: TokenizerSpec, theirs) -> str:
    """What training says of a folder whose tokenizer wrote the data; empty if it takes it."""
    from megatron_hybrid.training.megatron_tokenizer import compare

    try:
        compare("data/d", spec, theirs)
    except ValueError as error:
        return str(error)
    return ""


def plain_ids(theirs, samples):
    backend = theirs._tokenizer.tokenizer.backend_tokenizer
    return [one.ids for one in backend.encode_batch(samples, add_special_tokens=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_copied_gives_the_ids_of_the_original(originals, tmp_path, kind):
    original = originals[kind]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    spec = folder(tmp_path, original, {"tokenizer_class": "PreTrainedTokenizerFast"} | named)
    samples = [*texts(3), *hard_texts(MARKS)[::3]]
    wanted = [one.ids for one in original.encode_batch(samples, add_special_tokens=False)]
    ours, theirs = load_tokenizer(spec), megatrons(spec)
    assert [ids.tolist() for ids in split(ours.encode(samples))] == wanted == plain_ids(theirs, samples)
    assert (theirs.vocab_size, theirs.bos, theirs.eod) == (ours.vocab_size, ours.bos_id, ours.eod_id)
    assert compared(spec, theirs) == "" and ours.builder == ""


@pytest.mark.parametrize(
    ("kind", "builder", "equal"),
    [
        ("Llama 3", "GPT2Tokenizer", False),
        ("GPT-2", "GPT2Tokenizer", True),
        ("Llama 3", "LlamaTokenizer", True),  # transformers knows this fault of published folders
        ("Llama 2", "LlamaTokenizerFast", False),
        ("WordPiece", "BertTokenizer", False),
        ("Unigram", "T5Tokenizer", False),
        ("GPT-2", "NoSuchTokenizer", True),
    ],
)
def test_a_class_that_is_built_anew_is_refused_where_it_differs(originals, tmp_path, kind, builder, equal):
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    spec = folder(tmp_path, originals[kind], {"tokenizer_class": builder} | named)
    theirs, samples = megatrons(spec), texts(5)
    same = theirs._tokenizer.tokenizer.get_vocab() == originals[kind].get_vocab()
    same = same and plain_ids(theirs, samples) == [one.ids for one in originals[kind].encode_batch(samples)]
    said = compared(spec, theirs)
    assert (said == "") is equal and (same or said), said
    if said:
        assert "is not the one that wrote data/d" in said and "\n" not in said
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        folder(tmp_path, originals[kind], config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        assert compared(spec, megatrons(spec)) == "", "the remedy"


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags


TYPED = {"__type": "AddedToken"}
SPECIAL = {
    "one that is missing": ({"eos_token": "<|im_end|>"}, {}),
    "as objects": ({"bos_token": TYPED | token("<b>", lstrip=True), "eos_token": TYPED | token("</s>")}, {}),
    "several, not in the order of the file": (
        {"mask_token": "<m>", "pad_token": "<p>", "eos_token": "<e>", "image_token": "<i>", "bos_token": "<b>"},
        {},
    ),
    "extra": ({"extra_special_tokens": ["<x>", "</s>", "<y>"], "eos_token": "<e>"}, {}),
    "extra by name": ({"extra_special_tokens": {"video_token": "<v>"}, "eos_token": "<e>"}, {}),
    "additional": ({"additional_special_tokens": ["<x>", TYPED | token("<y>")], "cls_token": "<c>"}, {}),
    "a decoder, with gaps": (
        {"eos_token": "<e>", "added_tokens_decoder": {"900": token("<z>"), "705": token("<e>"), "3": token("tree")}},
        {},
    ),
    "a map that overrules": (
        {"eos_token": "<e>", "bos_token": "<b>"},
        {"special_tokens_map": {"eos_token": token("<other>"), "additional_special_tokens": ["<x>"]}},
    ),
    "a map beside a decoder": (
        {"eos_token": "<e>", "added_tokens_decoder": {}},
        {"special_tokens_map": {"eos_token": "<other>"}},
    ),
    "added_tokens.json": ({"eos_token": "<e>"}, {"added_tokens": {"<q>": 702, "<e>": 701}}),
    "stand-ins": ({"cls_token": "<c>", "sep_token": "<d>"}, {}),
    "a word of the vocabulary": ({"eos_token": "tree", "split_special_tokens": True}, {}),
    "none": ({}, {}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_tokens_are_megatrons(originals, tmp_path, case):
    config, files = SPECIAL[case]
    spec = folder(tmp_path, originals["GPT-2"], {"tokenizer_class": "PreTrainedTokenizerFast"} | config, **files)
    ours, theirs = load_tokenizer(spec), megatrons(spec)
    assert ours.vocabulary == theirs._tokenizer.tokenizer.get_vocab()
    assert (ours.bos_id, ours.eod_id, len(ours.vocabulary)) == (
        theirs.bos,
        theirs.eod,
        len(theirs._tokenizer.tokenizer),
    )
    around = [f"a {token}b" for token in ours.added_tokens()] + ["a tree", "a  <b> c"]
    assert [ids.tolist() for ids in split(ours.encode(around))] == plain_ids(theirs, around)
    assert compared(spec, theirs) == ""
    if case != "none":
        bare = folder(tmp_path / "bare", originals["GPT-2"], {"tokenizer_class": "PreTrainedTokenizerFast"})
        assert (load_tokenizer(bare).fingerprint == ours.fingerprint) == (ours.added_tokens() == MARKS)
    fast = GigatokenTokenizer(ours)
    if not config.get("split_special_tokens"):
        assert [ids.tolist() for ids in split(fast.encode(around))] == [
            ids.tolist() for ids in split(ours.encode(around))
        ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": {"content": "<e>"}}, "neither a text nor an AddedToken"),
        ({"extra_special_tokens": "<x>"}, "neither a list nor an object"),
        (
            {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<e>"},
            "1 tokens that tokenizer.json lacks, and the class GPT2",
        ),
    ],
)
def test_what_only_transformers_could_say_is_refused(originals, tmp_path, config, message):
    spec = folder(tmp_path, originals["GPT-2"], {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(spec)


def test_flags_that_add_tokens_are_refused(originals, tmp_path):
    spec = folder(tmp_path, originals["GPT-2"], {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    theirs = megatrons(spec, additional_special_tokens=["<new>"])
    assert "its id of the token '<new>' is 700, and there none" in compared(spec, theirs)


def test_an_added_token_that_would_take_the_id_of_another_is_refused(originals, tmp_path):
    config = json.loads(originals["GPT-2"].to_str())
    config["model"]["vocab"] = {w: i if i < 600 else i + 5 for w, i in config["model"]["vocab"].items()}
    gaps = Tokenizer.from_str(json.dumps(config))
    spec = folder(tmp_path, gaps, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"})
    vocabulary = megatrons(spec)._tokenizer.tokenizer.get_vocab()
    assert len(set(vocabulary.values())) < len(vocabulary), "in transformers two tokens share an id"
    with pytest.raises(ValueError, match="the token '<e>', which tokenizer.json lacks; .* an id of its own"):
        load_tokenizer(spec)


def test_a_vocabulary_with_gaps_reaches_to_its_largest_id(originals, tmp_path):
    from megatron_hybrid.patches.parsing import VOCABULARY
    from megatron_hybrid.patches.patching import install, uninstall

    config = json.loads(originals["GPT-2"].to_str())
    config["model"]["vocab"] = {w: i if i < 300 else i + 1000 for w, i in config["model"]["vocab"].items()}
    spec = folder(tmp_path, Tokenizer.from_str(json.dumps(config)), {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = load_tokenizer(spec), megatrons(spec)
    uninstall(VOCABULARY.name)
    assert (theirs.vocab_size, ours.vocab_size) == (700, 1700), "upstream counts"
    install(VOCABULARY)
    assert theirs.vocab_size == ours.vocab_size and compared(spec, theirs) == ""
    theirs.add_special_tokens({"mask_token": "<m>"})
    largest = max(theirs._tokenizer.tokenizer.get_vocab().values())
    assert theirs.vocab_size == largest + 1
