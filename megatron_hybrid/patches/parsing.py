"""Patches that must be there before flags are parsed: symbols of layers, and the size of vocabularies."""

from typing import Any

from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.patches.patching import Patch, Table, Value, install, is_installed
from megatron_hybrid.patches.unpickling import admit_known_classes_only

_SYMBOLS = "megatron.core.models.hybrid.hybrid_layer_allocation:Symbols"
_WHERE = "core/models/hybrid/hybrid_layer_allocation.py:14"


def size_by_largest_id(there: property) -> property:
    """Lets a vocabulary reach to its largest id.

    Upstream counts the tokens, and pads the embedding to that number: where ids have gaps, the largest lie outside.
    """
    count: Any = there.fget

    def vocab_size(self: Any) -> int:
        tokens = count(self)
        known: tuple[int, int] = self.__dict__.get("_largest", (0, 0))
        if known[0] != tokens:  # none were added since
            known = self.__dict__["_largest"] = tokens, max(self.tokenizer.get_vocab().values(), default=-1)
        return max(tokens, known[1] + 1)

    return property(vocab_size)


VOCABULARY = Table(
    "vocabulary",
    (
        Patch(
            "megatron.core.tokenizers.text.libraries.huggingface_tokenizer:HuggingFaceTokenizer",
            "vocab_size",
            size_by_largest_id,
            "upstream counts tokens, and ids with gaps reach beyond their number",
            "core/tokenizers/text/libraries/huggingface_tokenizer.py:307",
        ),
    ),
)


def register_symbols() -> None:
    """Lets patterns contain the layers of the registry that upstream does not have. A second call adds new ones."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    for symbol in [symbol for symbol in LAYERS if symbol not in Symbols.VALID_LAYERS]:
        name = f"LAYER_{ord(symbol)}"
        rows = (
            # name_sorted_valid_layer_symbols lists the class's attributes, not the set
            Patch(_SYMBOLS, name, Value(symbol), "lists of symbols name it", _WHERE, True, "register_symbols"),
            Patch(
                _SYMBOLS, "VALID_LAYERS", _Added(symbol), "patterns may have it", _WHERE, contract="register_symbols"
            ),
        )
        before = tuple(name for name in map(_table_name, LAYERS) if is_installed(name))
        install(Table(_table_name(symbol), rows, after=before))


def _table_name(symbol: str) -> str:
    return f"symbol {symbol}"


class _Added(Value):
    def __call__(self, there: Any) -> Any:
        return there | {self.value}


def before_parsing(tokenizers: bool = True) -> None:
    """What Megatron's parser and everything behind it need. A second call does nothing more.

    Args:
        tokenizers: Also what Megatron's tokenizers need; their import takes 1.5 s.
    """
    register_symbols()
    if tokenizers:
        install(VOCABULARY)
    admit_known_classes_only()
