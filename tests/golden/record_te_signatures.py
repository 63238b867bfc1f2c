"""Records in te_signatures.json what Megatron uses of Transformer Engine, from Transformer Engine's own sources.

Run it after a change of the Transformer Engine or Megatron-Core version, from the repository root:

    pip install --no-deps --target /tmp/te transformer-engine==VERSION \
        onnx onnx_ir onnxscript ml_dtypes nvdlfw-inspect pydantic pydantic_core annotated_types typing_inspection
    python -m tests.golden.record_te_signatures /tmp/te

No GPU and no compiled part is needed: constructors and parameters are Python.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "te_signatures.json"
MODULES = ("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "LayerNorm", "DotProductAttention")
"""The classes of transformer_engine.pytorch that Megatron builds layers from."""

COLUMN = {"in_features": 8, "out_features": 12, "tp_size": 2, "parallel_mode": "column"}
ROW = {"in_features": 8, "out_features": 12, "tp_size": 2, "parallel_mode": "row"}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "Linear": [
        {**COLUMN, "bias": False},
        {**COLUMN, "bias": True, "sequence_parallel": True},
        {**ROW, "bias": True, "sequence_parallel": True},
        {"in_features": 8, "out_features": 12, "bias": False},
    ],
    "LayerNormLinear": [
        {**COLUMN, "bias": False, "normalization": "RMSNorm", "sequence_parallel": True},
        {**COLUMN, "bias": True, "normalization": "LayerNorm"},
    ],
    "GroupedLinear": [
        {"num_gemms": 3, "in_features": 8, "out_features": 12, "bias": False},
        {"num_gemms": 2, **COLUMN, "bias": False},
        {"num_gemms": 2, "in_features": 8, "out_features": 12, "bias": True},
        {"num_gemms": 2, **ROW, "bias": False},
    ],
    "RMSNorm": [{"normalized_shape": 8, "eps": 1e-5, "sequence_parallel": True}],
    "LayerNorm": [{"normalized_shape": 8, "eps": 1e-5, "sequence_parallel": False}],
    "DotProductAttention": [{"num_attention_heads": 4, "kv_channels": 8, "num_gqa_groups": 2}],
}
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
"""Attributes of parameters that Megatron reads."""


def import_transformer_engine(folder: str | None = None) -> types.ModuleType:
    """The real package, from ``folder`` or as installed; its compiled part is replaced when it is not there.

    ``torch.cuda.is_available()`` must be true, or answered by the CPU engine, before a module is built.
    """
    if folder:
        sys.path.append(folder)
    if importlib.util.find_spec("transformer_engine_torch") is None:
        os.environ["NVTE_PROJECT_BUILDING"] = "1"  # skips loading the compiled core
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch")
    importlib.import_module("transformer_engine.pytorch")
    return importlib.import_module("transformer_engine")


class _Numbered(type):
    """An enumeration of whatever members it is asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__members__))
        return getattr(cls, name)

    @property
    def __members__(cls) -> dict[str, int]:
        return {k: v for k, v in vars(cls).items() if not k.startswith("_")}


class _Extension(types.ModuleType):
    """In place of the compiled extension: names alone, as constructors and imports need no more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Numbered(name, (), {}))
        return getattr(self, name)


def signature(cls: type) -> list[list[Any]]:
    """``[name, keyword_only, required]`` of each parameter; ``**kwargs`` is resolved through the base classes."""
    found: dict[str, list[Any]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(p.name, [p.name, p.kind is p.KEYWORD_ONLY, p.default is p.empty])
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    first = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return [[name, keyword or name not in first, required] for name, keyword, required in found.values()]


def state(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Shapes and marks of what a module stores, when built on the CPU; None for ``_extra_state``."""
    device = {} if cls.__name__ == "DotProductAttention" else {"device": "cpu"}
    stored = cls(**arguments, **device).state_dict(keep_vars=True)
    return {
        name: None
        if name.endswith("_extra_state")
        else {"shape": list(value.shape), **{m: getattr(value, m) for m in MARKS if hasattr(value, m)}}
        for name, value in stored.items()
    }


def upstream_names() -> set[str]:
    """Dotted names of Transformer Engine that Megatron's sources mention."""
    names: set[str] = set()
    for package in ("megatron.core", "megatron.training"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
            text = path.read_text()
            if re.search(r"^\s*(from|import) transformer_engine", text, re.MULTILINE):
                names.update(_names_in(ast.parse(text)))
    return {name for name in names if name.startswith("transformer_engine.")}


def _names_in(tree: ast.AST) -> Iterator[str]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "transformer_engine":
                    yield a.name
                    aliases[a.asname or "transformer_engine"] = a.name if a.asname else "transformer_engine"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformer_engine":
            for a in node.names:
                yield f"{node.module}.{a.name}"
                aliases[a.asname or a.name] = f"{node.module}.{a.name}"
    for node in ast.walk(tree):
        chain, root = [], node
        while isinstance(root, ast.Attribute):
            chain.append(root.attr)
            root = root.value
        if chain and isinstance(root, ast.Name) and root.id in aliases:
            yield ".".join([aliases[root.id], *reversed(chain)])


def kinds(names: set[str]) -> dict[str, str]:
    """``module``, ``class``, ``function``, ``value`` or ``missing`` for each name; members of classes are left out."""
    result: dict[str, str] = {}
    for name in sorted(names):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            prefix = ".".join(parts[:i])
            result[prefix] = _kind(prefix)
            if result[prefix] != "module":
                break
    return result


def _kind(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    value = getattr(importlib.import_module(parent), leaf, None) if parent else None
    if value is None:
        try:
            value = importlib.import_module(name)
        except ImportError:
            return "missing"
    if inspect.ismodule(value):
        return "module"
    if isinstance(value, _Numbered):
        return "function"  # of the compiled part, when that is replaced
    if inspect.isclass(value):
        return "class"
    return "function" if callable(value) else "value"


def record() -> dict[str, Any]:
    """The golden's content, from the Transformer Engine that is imported."""
    import transformer_engine

    pytorch = transformer_engine.pytorch
    return {
        "source": f"transformer-engine {transformer_engine.__version__}, transformer_engine/pytorch",
        "version": transformer_engine.__version__,
        "modules": {
            name: {
                "signature": signature(getattr(pytorch, name)),
                "examples": [{"arguments": a, "state": state(getattr(pytorch, name), a)} for a in EXAMPLES[name]],
            }
            for name in MODULES
        },
        "names": kinds(upstream_names()),
    }


if __name__ == "__main__":
    from megatron_hybrid.patches import cpu

    cpu.install()
    import_transformer_engine(sys.argv[1] if len(sys.argv) > 1 else None)
    GOLDEN.write_text(json.dumps(record(), indent=1) + "\n")
    print(f"wrote {GOLDEN}")
