"""Patches that must be there before flags are parsed: symbols of layers, and the size of vocabularies."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.patches.table import Patch, Table, Value, install
from megatron_hybrid.patches.unpickling import admit_known_classes_only

OUR_SYMBOLS = {"P": "INTRA", "W": "SWA"}
"""Symbol of each layer of ours to its attribute of upstream's ``Symbols``."""
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


def register_symbols(symbols: Mapping[str, str] = OUR_SYMBOLS) -> None:
    """Lets patterns contain layers that upstream does not have. Those that are registered already stay as they are.

    Args:
        symbols: One-character symbols to attribute names of upstream's ``Symbols``.
    """
    for symbol, name in symbols.items():
        rows = (
            # name_sorted_valid_layer_symbols lists the class's attributes, not the set
            Patch(_SYMBOLS, name, Value(symbol), "lists of symbols name it", _WHERE, True, "register_symbols"),
            Patch(
                _SYMBOLS, "VALID_LAYERS", _Added(symbol), "patterns may have it", _WHERE, contract="register_symbols"
            ),
        )
        before = tuple(f"symbol {other}" for other in _registered if other != symbol)
        install(Table(f"symbol {symbol}", rows, after=before))
        _registered[symbol] = None


_registered: dict[str, None] = {}


class _Added(Value):
    def __call__(self, there: Any) -> Any:
        return there | {self.value}


def before_parsing() -> None:
    """What Megatron's parser and everything behind it need. A second call does nothing."""
    register_symbols()
    install(VOCABULARY)
    admit_known_classes_only()
