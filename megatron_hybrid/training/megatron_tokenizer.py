"""Megatron's own tokenizer beside the one that wrote the data: the same tokens, the same ids."""

from typing import Any

from megatron_hybrid.data.gigatokens import hard_texts
from megatron_hybrid.data.special_tokens import REMEDY
from megatron_hybrid.data.tokenizers import HuggingFaceTokenizer, Tokenizer, TokenizerSpec, load_tokenizer, split

_SAMPLE = 3000
"""Tokens of the vocabulary of which texts are made for the comparison."""


def compare(prefix: str, spec: TokenizerSpec, theirs: Any) -> None:
    """Refuses a run whose tokenizer gives other ids than the one that wrote its data.

    Flags add tokens to Megatron's; transformers builds some classes anew from the vocabulary (tokenizer_class of
    tokenizer_config.json; GPT2Tokenizer takes GPT-2's splitting rule, whatever tokenizer.json says) and adds tokens of
    its own to it.

    Args:
        prefix: A data set that a tokenizer with the same fingerprint as that of ``spec`` wrote.
        spec: The run's tokenizer.
        theirs: Megatron's tokenizer, as the run has built it.

    Raises:
        ValueError: With the first difference, and how to have the ids of the data.
    """
    ours = load_tokenizer(spec)
    if not isinstance(ours, HuggingFaceTokenizer):
        sizes = f"it has {theirs.vocab_size:,} tokens, and there {ours.vocab_size:,}"
        if differs := sizes if theirs.vocab_size != ours.vocab_size else _marks(ours, theirs):
            raise ValueError(
                f"Megatron's tokenizer of {spec.model} is not the one that wrote {prefix}: {differs}. Drop flags that "
                "add tokens (--special-tokens), or preprocess with a tokenizer that has them."
            )
        return
    differs = _difference(ours, theirs)
    if differs:
        kind = type(theirs._tokenizer.tokenizer).__name__
        cause = f"transformers builds its class, {kind}, anew" if ours.builder else f"transformers loads it as {kind}"
        raise ValueError(
            f"Megatron's tokenizer of {spec.model} is not the one that wrote {prefix}: {differs}. The data have the "
            f"ids of tokenizer.json and of what the files beside it name; {cause}. For the ids of the data {REMEDY} of "
            f"that folder, and drop flags that add tokens (--special-tokens, --vocab-file)."
        )


def _difference(ours: HuggingFaceTokenizer, theirs: Any) -> str:
    """The first difference, for the user; empty if there is none."""
    library = theirs._tokenizer
    vocabulary = library.tokenizer.get_vocab()
    if vocabulary != ours.vocabulary:
        token, place = min(vocabulary.items() ^ ours.vocabulary.items(), key=lambda pair: (-pair[1], pair[0]))
        here, there = (found.get(token, "none") for found in (vocabulary, ours.vocabulary))
        return f"its id of the token {token!r} is {here}, and there {there}"
    if differs := _marks(ours, theirs):
        return differs
    texts = hard_texts(ours.added_tokens()) + _texts_of_tokens(ours)
    for text, ids in zip(texts, split(ours.encode(texts)), strict=True):
        here = library.tokens_to_ids(library.text_to_tokens(text))
        if here != ids.tolist() and _plain(library, text) != ids.tolist():
            return f"the text {text[:60]!r} has {len(here)} tokens, and there {len(ids)}, or others"
    return ""


def _marks(ours: Tokenizer, theirs: Any) -> str:
    """What differs in the tokens that start and end documents, for the user; SentencePiece says -1 for none."""
    for name, place, there in (("BOS", "bos", ours.bos_id), ("EOS", "eod", ours.eod_id)):
        here = getattr(theirs, place, there)  # --tokenizer-sentencepiece-legacy has none
        if here != there and not (here == -1 and there is None):
            return f"its {name} token is {here}, and there {there}"
    return ""


def _plain(library: Any, text: str) -> list[int]:
    """Ids as the library gives them, which Megatron finds again by the tokens' names: not all have one."""
    backend = getattr(library.tokenizer, "backend_tokenizer", None)
    return backend.encode(text, add_special_tokens=False).ids if backend is not None else []


def _texts_of_tokens(ours: HuggingFaceTokenizer) -> list[str]:
    """Texts of whole tokens, where rules for splitting differ: each token twice, with the next one behind it."""
    ids = list(range(0, ours.vocab_size, max(1, ours.vocab_size // _SAMPLE)))
    pieces = [ours.decode([token]) for token in ids]
    return [a + a + b + a for a, b in zip(pieces, [*pieces[1:], ""], strict=True)]
