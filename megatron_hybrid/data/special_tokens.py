"""What the files next to a tokenizer.json add to it: the tokens of training's tokenizer, with the same ids.

Megatron's HuggingFaceTokenizer loads a folder by transformers' AutoTokenizer. Tokens that tokenizer_config.json,
special_tokens_map.json or added_tokens.json name and tokenizer.json lacks are then appended to its vocabulary in
order. The same calls are made here, in the same order, on the same Rust library, without an import of transformers.

Source: transformers 5.23, tokenization_utils_base.py:1781 (_from_pretrained) and :995 (__init__),
tokenization_utils_tokenizers.py:360 (TokenizersBackend.__init__); Megatron's
core/tokenizers/text/libraries/huggingface_tokenizer.py:87. Tests compare with both.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""transformers' SPECIAL_TOKENS_ATTRIBUTES, in its order."""
PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
"""Values of tokenizer_class, without "Fast", for which transformers takes tokenizer.json as it is."""
REMEDY = 'set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'


@dataclass(frozen=True)
class Special:
    """The special tokens that a folder's files name."""

    bos: str | None = None
    eos: str | None = None
    builder: str = ""
    """The class that transformers may rebuild from the vocabulary, rather than take tokenizer.json as it is."""


def add_special_tokens(tokenizer: Tokenizer, file: Path) -> Special:
    """Add to a tokenizer what the files next to its ``tokenizer.json`` name and it lacks.

    Returns the tokens that start and end documents for Megatron. Raises ValueError for files that transformers refuses,
    and for tokens whose ids only it knows.
    """
    config_file = file.with_name("tokenizer_config.json")
    settings = _read(config_file)
    builder = _builder(settings, file)
    before = tokenizer.get_vocab(with_added_tokens=True)
    try:
        padding = {"pad_token": tokenizer.padding["pad_token"]} if tokenizer.padding else {}
        named, extra, decoder = _settings(settings, padding, file)
        _add(tokenizer, {name: token for name, token in named.items() if token}, extra, decoder)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{config_file} and the files next to it: their tokens cannot be read as transformers reads them "
            f"({error}). Write each special token as a text, or as an object as in added_tokens_decoder."
        ) from None
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    after = tokenizer.get_vocab(with_added_tokens=True)
    added = {token: place for token, place in after.items() if token not in before}
    taken = {place: token for token, place in before.items()}
    for token, place in added.items():
        if place in taken:
            raise ValueError(
                f"{config_file.parent} names the token {token!r}, which {file.name} lacks; transformers gives it the "
                f"id {place} (it counts tokens, and the ids have gaps), which {taken[place]!r} has. Write it into "
                f"added_tokens of {file.name} with an id of its own."
            )
    if added and builder:
        raise ValueError(
            f"{config_file.parent} names {len(added)} tokens that {file.name} lacks, and the class {builder}: their "
            f"ids depend on how transformers builds that class. To append them to the vocabulary, in their order, "
            f"{REMEDY}."
        )
    text = {
        name: str(token.content if isinstance(token, AddedToken) else token) for name, token in named.items() if token
    }
    bos, eos = text.get("bos_token") or text.get("cls_token"), text.get("eos_token") or text.get("sep_token")
    return Special(bos, eos, builder)


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return found


def _builder(settings: dict[str, Any], file: Path) -> str:
    """The class that may be rebuilt; empty where tokenizer.json is taken as it is."""
    name = settings.get("tokenizer_class") or _read(file.with_name("config.json")).get("tokenizer_class")
    kind = str(name or _read(file.with_name("config.json")).get("model_type") or "").removesuffix("Fast")
    return "" if kind in PLAIN_CLASSES else kind


def _settings(
    settings: dict[str, Any], defaults: dict[str, Any], file: Path
) -> tuple[dict[str, Any], list[Any], dict[int, AddedToken]]:
    """Named tokens in transformers' order, extra ones, and added_tokens_decoder, as it makes them of the files."""
    settings = dict(settings)
    _rename_additional(settings)
    models_own = {
        key: settings.pop(key)
        for key in list(settings)
        if key.endswith("_token") and key not in NAMES and isinstance(settings[key], str)
    }
    if isinstance(settings.get("extra_special_tokens"), dict):
        models_own |= settings.pop("extra_special_tokens")
    decoder: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        decoder = {int(place): AddedToken(**token) for place, token in settings.pop("added_tokens_decoder").items()}
    else:
        _merge_map(settings, models_own, _read(file.with_name("special_tokens_map.json")))
        decoder = _legacy_decoder(settings, file)
    if "extra_special_tokens" not in settings and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    by_text = {token.content: token for token in decoder.values()}
    named = {name: _token((defaults | settings).get(name)) for name in NAMES}
    named = {name: by_text.get(_text(token), token) if token else None for name, token in named.items()}
    others = {key: value for key, value in settings.items() if key.endswith("_token") and key not in NAMES}
    own = {key: value for key, value in others.items() if not isinstance(value, dict) or "__type" in value}
    own = {key: _token(value) for key, value in own.items() if isinstance(value, (str, dict, AddedToken))}
    named |= own | {key: _token(value) for key, value in models_own.items()}
    extra = settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | {key: _token(value) for key, value in extra.items()}, []
    if not isinstance(extra, list):
        raise TypeError("extra_special_tokens is neither a list nor an object")
    return named, [_token(token) for token in extra], decoder


def _rename_additional(settings: dict[str, Any]) -> None:
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")


def _merge_map(settings: dict[str, Any], models_own: dict[str, Any], found: dict[str, Any]) -> None:
    """Let special_tokens_map.json overrule tokenizer_config.json, which it does where no added_tokens_decoder is."""
    for key, value in found.items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = AddedToken(**{k: v for k, v in value.items() if k != "special"}, special=True)
        elif key == "extra_special_tokens" and isinstance(value, list):
            existing = list(settings.get(key) or [])
            for token in value:
                token = AddedToken(**token, special=True) if isinstance(token, dict) else token
                if token not in existing:
                    existing.append(token)
            value = existing
        settings[key] = value
    if isinstance(settings.get("extra_special_tokens"), dict):
        models_own |= settings.pop("extra_special_tokens")


def _legacy_decoder(settings: dict[str, Any], file: Path) -> dict[int, AddedToken]:
    """added_tokens_decoder where tokenizer_config.json has none: of added_tokens.json and tokenizer.json."""
    tokens = [*(settings.get(name) for name in NAMES), *(settings.get("extra_special_tokens") or [])]
    special = {_text(token) for token in tokens if isinstance(token, (str, AddedToken))}  # objects are not read yet
    decoder = {}
    for text, place in _read(file.with_name("added_tokens.json")).items():
        flags = {"normalized": text not in special, "special": text in special}
        decoder[place] = AddedToken(text, rstrip=False, lstrip=False, **flags)
    for token in _read(file).get("added_tokens") or []:
        decoder[token["id"]] = AddedToken(**{key: value for key, value in token.items() if key != "id"})
    return decoder


def _add(tokenizer: Tokenizer, named: dict[str, Any], extra: list[Any], decoder: dict[int, AddedToken]) -> None:
    """The calls of TokenizersBackend.__init__, then those of Megatron's tokenizer."""
    waiting: list[Any] = [token for _, token in sorted(decoder.items(), key=lambda pair: pair[0])]
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *waiting)}
    for token in [*named.values(), *extra]:
        if _text(token) not in known and token not in waiting:
            waiting.append(token)
    names = {_text(token) for token in named.values()}
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in waiting]
    for token in tokens:
        if token.content in names:
            token.special = True
    tokenizer.add_tokens(tokens)
    # Megatron uses the separator for a missing end, the class token for a missing start, and the other way round
    pairs = (("sep_token", "eos_token"), ("cls_token", "bos_token"))
    stand_ins = [named.get(a) or named.get(b) for a, b in pairs if bool(named.get(a)) != bool(named.get(b))]
    same = [AddedToken(_text(token), rstrip=False, lstrip=False, normalized=False, special=True) for token in stand_ins]
    tokenizer.add_special_tokens(same)


def _token(value: Any) -> Any:
    """A token as transformers takes it: a text, or an AddedToken of an object that says so."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{key: part for key, part in value.items() if key != "__type"})
    if value is not None and not isinstance(value, (str, AddedToken)):
        raise TypeError(f"{value!r} is neither a text nor an AddedToken")
    return value


def _text(token: Any) -> str:
    return token.content if isinstance(token, AddedToken) else token
