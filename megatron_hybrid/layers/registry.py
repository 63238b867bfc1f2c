"""The one table of layers: pattern symbol to everything that is known about it.

A layer of the package has a folder here with ``account.py`` (costs, pure Python), ``module.py`` (what runs) and
``check.py`` (what its flags and the layout must satisfy, pure Python). A layer from elsewhere is registered by a file
that ``--layers-from`` names, or by a package with an entry point of the group ``megatron_hybrid.layers``; both call
:func:`register`. ``examples/custom_layer`` is one.

Imports neither torch nor Megatron: ``Layer.module`` is imported when a model is built.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.layers.account import Account
from megatron_hybrid.layers.attention import check as attention_check
from megatron_hybrid.layers.attention.account import AttentionAccount, WindowAccount
from megatron_hybrid.layers.delta import check as delta_check
from megatron_hybrid.layers.delta.account import DeltaAccount
from megatron_hybrid.layers.ffn import check as ffn_check
from megatron_hybrid.layers.ffn.account import FFNAccount
from megatron_hybrid.layers.intra import check as intra_check
from megatron_hybrid.layers.intra.account import IntraAccount
from megatron_hybrid.layers.mamba import check as mamba_check
from megatron_hybrid.layers.mamba.account import MambaAccount
from megatron_hybrid.layers.moe import check as moe_check
from megatron_hybrid.layers.moe.account import ExpertsAccount

ENTRY_POINTS = "megatron_hybrid.layers"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a symbol of a pattern stands for."""

    symbol: str
    """One printable character that means nothing else in a pattern."""
    name: str
    kind: Literal["mixer", "ffn"]
    attention_bearing: bool
    """Counts as attention in ``--block-ratio``."""
    account: Account
    check: Callable[[Namespace], None]
    """Raises ValueError for flags or a layout that the layer cannot run with."""
    module: str
    """Importable module with ``spec(symbol, build)``: see :class:`megatron_hybrid.layers.spec.Build`."""
    color: str
    """In plots."""
    build_with: tuple[str, ...] = ()
    """Arguments beside the usual ones that its module takes: ``pp_layer_offset``, ``is_mtp_layer``."""
    has_experts: bool = False
    """Has a router and routed experts: counts for expert parallelism and expert loads."""
    branch: str | None = None
    """Of this package's layers: the branch of a ``P`` that a trained one can initialise, ``attention`` or ``mamba``."""
    keeps_documents_apart: bool = True
    """Takes the boundaries of packed documents (``--reset-attention-mask``)."""
    own_norm: bool = False
    """Its norms are plain RMSNorms of this package on every backend."""
    flags: type | None = None
    """A dataclass whose fields become command-line flags, as those of ``cli/config.py`` do."""

    def spec(self, build: Any) -> Any:
        """The ``ModuleSpec`` of the layer; imports torch and Megatron."""
        return importlib.import_module(self.module).spec(self.symbol, build)


LAYERS: dict[str, Layer] = {}
"""Symbol to layer, in the order of registration."""
RESERVED = {
    "D": "Megatron's sparse attention (D) is not wired into this project",
    "+": "Megatron's multi-latent attention (+) is not wired into this project",
}
"""Upstream's symbols that no layer here may take, and what is said about them."""
_GRAMMAR = set("|/()0123456789[],:")
_loaded: set[Path] = set()


def register(layer: Layer) -> Layer:
    """Adds a layer.

    Raises:
        ValueError: The symbol cannot be one, or is taken.
    """
    symbol = layer.symbol
    if len(symbol) != 1 or not symbol.isascii() or not symbol.isprintable() or symbol.isspace() or symbol in _GRAMMAR:
        raise ValueError(
            f"the symbol of the layer {layer.name!r} is {symbol!r}: take one letter or sign without another meaning"
        )
    if symbol in RESERVED:
        raise ValueError(f"the symbol of the layer {layer.name!r} is {symbol!r}, and {RESERVED[symbol]}")
    if symbol in LAYERS:
        taken = " ".join(LAYERS)
        raise ValueError(
            f"the symbol {symbol!r} of the layer {layer.name!r} is that of {LAYERS[symbol].name!r}; taken are {taken}"
        )
    if "symbol" in vars(layer.account):
        raise ValueError(
            f"the account of the layer {layer.name!r} is that of {layer.account.symbol!r} already: give {symbol!r} an "
            "account of its own"
        )
    layer.account.symbol, layer.account.name = symbol, layer.name
    LAYERS[symbol] = layer
    return layer


def load(files: Iterable[str | Path]) -> None:
    """Imports files that register layers, each once in a process.

    A file is imported under its own name, and what lies next to it can be imported, too: ``Layer.module`` may name the
    file itself or a neighbour.

    Raises:
        ValueError: A file is missing, fails, has the name of another module, or registers nothing.
    """
    for file in files:
        path = Path(file).resolve()
        if path in _loaded:
            continue
        if not path.is_file():
            raise ValueError(f"--layers-from {file}: there is no such file.")
        before = len(LAYERS)
        is_new = _import(file, path)
        if is_new and len(LAYERS) == before:
            raise ValueError(f"--layers-from {file}: it registers no layer; call megatron_hybrid.layers.register(...).")
        _loaded.add(path)


def _import(file: str | Path, path: Path) -> bool:
    """Whether the file was not imported before, as it is where another file has imported it."""
    known = sys.modules.get(path.stem)
    if known is not None and _is(path, getattr(known, "__file__", None)):
        return False
    there = importlib.util.find_spec(path.stem) if known is None else None
    if known is not None or there is not None and not _is(path, there.origin):
        raise ValueError(f"--layers-from {file}: there is another module {path.stem}; rename the file.")
    sys.path.append(str(path.parent))
    try:
        importlib.import_module(path.stem)
    except Exception as error:
        why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--layers-from {file}: {why}") from error
    return True


def _is(path: Path, origin: str | None) -> bool:
    return origin is not None and Path(origin).resolve() == path


@functools.cache
def load_entry_points() -> None:
    """Loads the layers that installed packages register, once in a process: every command line asks for them.

    Raises:
        ValueError: One cannot be loaded; with its package.
    """
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "a package"
            raise ValueError(
                f"The layers of the installed package {package} ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Mend or uninstall it."
            ) from error


def layer(symbol: str) -> Layer:
    """The layer of a symbol.

    Raises:
        ValueError: There is none.
    """
    if symbol not in LAYERS:
        raise ValueError(f"{symbol!r} is not a layer; the layers are {' '.join(LAYERS)}")
    return LAYERS[symbol]


def account(symbol: str) -> Account:
    """The costs of a symbol's layer.

    Raises:
        ValueError: There is none.
    """
    return layer(symbol).account


def layers_of(pattern: str) -> list[Layer]:
    """The kinds of layers in the text of a pattern, each once, in the order of the table."""
    return [found for symbol, found in LAYERS.items() if symbol in pattern]


def has_experts(pattern: str) -> bool:
    """Whether a pattern has layers with routed experts."""
    return any(found.has_experts for found in layers_of(pattern))


def measured(args: Namespace) -> Callable[[list], dict[str, Any]] | None:
    """What the layers of a run measure of themselves (``Account.measured``), as one function; None: nothing."""
    names = [layer.account.measured(args) for layer in layers_of(args.hybrid_layer_pattern)]
    functions = []
    for module, _, function in (name.partition(":") for name in names if name):
        functions.append(getattr(importlib.import_module(module), function))
    if not functions:
        return None
    return lambda chunks: {name: values for f in functions for name, values in f(chunks).items()}


_PACKAGE = "megatron_hybrid.layers"
_ATTENTION: dict[str, Any] = {
    "kind": "mixer",
    "attention_bearing": True,
    "module": f"{_PACKAGE}.attention.module",
    "build_with": ("pp_layer_offset", "is_mtp_layer"),
    "branch": "attention",
}
# Colours after Paul Tol's bright scheme, which colour-blind readers can tell apart
for _layer in (
    Layer(
        symbol="M",
        name="Mamba-2",
        kind="mixer",
        attention_bearing=False,
        account=MambaAccount(),
        check=mamba_check.check,
        module=f"{_PACKAGE}.mamba.module",
        branch="mamba",
        color="#4477aa",
    ),
    Layer(
        symbol="*",
        name="attention",
        account=AttentionAccount(),
        check=attention_check.check,
        color="#ee6677",
        **_ATTENTION,
    ),
    Layer(
        symbol="W",
        name="sliding-window attention with sinks",
        account=WindowAccount(),
        check=attention_check.check_window,
        color="#ccbb44",
        **_ATTENTION,
    ),
    Layer(
        symbol="P",
        name="intra-layer hybrid of two mixers",
        kind="mixer",
        attention_bearing=True,
        account=IntraAccount(),
        check=intra_check.check,
        module=f"{_PACKAGE}.intra.module",
        build_with=("pp_layer_offset", "is_mtp_layer"),
        own_norm=True,
        color="#aa3377",
    ),
    Layer(
        symbol="G",
        name="gated delta net",
        kind="mixer",
        attention_bearing=False,
        account=DeltaAccount(),
        check=delta_check.check,
        module=f"{_PACKAGE}.delta.module",
        keeps_documents_apart=False,
        color="#66ccee",
    ),
    Layer(
        symbol="-",
        name="dense FFN",
        kind="ffn",
        attention_bearing=False,
        account=FFNAccount(),
        check=ffn_check.check,
        module=f"{_PACKAGE}.ffn.module",
        color="#997700",
    ),
    Layer(
        symbol="E",
        name="mixture-of-experts FFN",
        kind="ffn",
        attention_bearing=False,
        account=ExpertsAccount(),
        check=moe_check.check,
        module=f"{_PACKAGE}.moe.module",
        build_with=("is_mtp_layer",),
        has_experts=True,
        color="#228833",
    ),
):
    register(_layer)
