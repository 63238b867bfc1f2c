"""A stand-in for Transformer Engine where it is not installed: its names, signatures and parameters, no arithmetic.

Everything comes from golden/te_signatures.json, which golden/record_te_signatures.py recorded from the real
package. The layers that Megatron builds on check each argument of their constructors and hold parameters of the
recorded names, shapes and marks; a name that the real package lacks is missing here too, and whatever else
is called raises.
"""

import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/te_signatures.json").read_text())


def install() -> types.ModuleType:
    """Puts the stand-in where ``import transformer_engine`` finds it, in this process."""
    if "transformer_engine" in sys.modules:
        raise RuntimeError("transformer_engine is imported already")
    modules = {name: types.ModuleType(name) for name, kind in GOLDEN["names"].items() if kind == "module"}
    for name, kind in GOLDEN["names"].items():
        parent, _, leaf = name.rpartition(".")
        if parent and kind != "missing":
            setattr(modules[parent], leaf, modules[name] if kind == "module" else _placeholder(name, kind))
    for name, layer in LAYERS.items():
        setattr(modules["transformer_engine.pytorch"], name, layer)
    modules["transformer_engine"].__version__ = GOLDEN["version"]  # type: ignore[attr-defined]
    sys.meta_path.append(_Finder(modules))
    import transformer_engine

    return transformer_engine


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, modules: dict[str, types.ModuleType]):
        self.modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.modules:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _placeholder(name: str, kind: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not part of the stand-in")

    if kind == "class":
        return type(name.rpartition(".")[2], (), {"__init__": refuse, "__module__": name.rpartition(".")[0]})
    return refuse if kind == "function" else object()


def _bind(name: str, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as the recorded signature takes them.

    Raises:
        TypeError: One is unknown or missing.
    """
    parameters = [
        inspect.Parameter(
            parameter,
            inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if required else None,
        )
        for parameter, keyword_only, required in GOLDEN["modules"][name]["signature"]
    ]
    try:
        return inspect.Signature(parameters).bind(*arguments, **keywords).arguments
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


class _Layer(torch.nn.Module):
    """Parameters, and the empty extra state that layers without FP8 have."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        layer = next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)
        self.arguments = _bind(layer, args, kwargs)
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.tp_size = self.arguments.get("tp_size", 1)
        self.sequence_parallel = self.arguments.get("sequence_parallel", False)
        self.build(**self.arguments)

    build: Callable[..., None]
    """Adds the parameters that the checked arguments ask for."""

    def add(self, name: str, shape: tuple[int, ...], **marks: Any) -> None:
        """One parameter, with the attributes that Megatron reads."""
        dtype, device = self.arguments.get("params_dtype"), self.arguments.get("device", "cuda")
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        for mark, value in marks.items():
            setattr(parameter, mark, value)
        self.register_parameter(name, parameter)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise ValueError("the stand-in has no FP8 state")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


class Linear(_Layer):
    def build(self, in_features: int, out_features: int, bias: bool = True, **others: Any) -> None:
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode = others.get("parallel_mode")
        if self.parallel_mode == "column":
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            self.in_features //= self.tp_size
        split = {"tensor_model_parallel": True, "partition_stride": 1}
        self.add(
            "weight", (self.out_features, self.in_features), **split, partition_dim=int(self.parallel_mode == "row")
        )
        if bias and self.parallel_mode == "row":
            self.add("bias", (self.out_features,), sequence_parallel=self.sequence_parallel)
        elif bias:
            self.add("bias", (self.out_features,), **split, partition_dim=0)


class LayerNormLinear(Linear):
    def build(self, normalization: str = "LayerNorm", **others: Any) -> None:  # type: ignore[override]
        self.eps = others.pop("eps", 1e-5)
        for name in ("layer_norm_weight", "layer_norm_bias")[: 1 if normalization == "RMSNorm" else 2]:
            self.add(name, (others["in_features"],), sequence_parallel=self.sequence_parallel)
        super().build(**others)

    def _get_weight_and_bias_tensors(self) -> tuple[torch.Tensor, Any]:
        return self.weight, None


class GroupedLinear(_Layer):
    def build(self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, **others: Any) -> None:
        mode = others.get("parallel_mode")
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features = in_features // self.tp_size if mode == "row" else in_features
        self.out_features = out_features // self.tp_size if mode == "column" else out_features
        if bias and self.tp_size > 1 and mode:
            raise ValueError("GroupedLinear doesn't support bias when TP > 1")
        if others.get("single_grouped_weight") or others.get("single_grouped_bias"):
            raise NotImplementedError("one grouped parameter is not part of the stand-in")
        for i in range(num_gemms):
            self.add(f"weight{i}", (self.out_features, self.in_features))
            if bias:
                self.add(f"bias{i}", (self.out_features,))


class RMSNorm(_Layer):
    def build(self, normalized_shape: int, **others: Any) -> None:
        self.add("weight", (normalized_shape,), sequence_parallel=self.sequence_parallel)


class LayerNorm(RMSNorm):
    def build(self, normalized_shape: int, **others: Any) -> None:
        super().build(normalized_shape)
        self.add("bias", (normalized_shape,), sequence_parallel=self.sequence_parallel)


class DotProductAttention(_Layer):
    def build(self, **others: Any) -> None:
        # As the real one (attention/dot_product_attention): upstream's checkpoints do not hold its extra state
        def ignore_extra_state(module: Any, incompatible: Any) -> None:
            incompatible.missing_keys[:] = [
                key for key in incompatible.missing_keys if "core_attention._extra_state" not in key
            ]

        self.register_load_state_dict_post_hook(ignore_extra_state)


LAYERS = {
    layer.__name__: layer for layer in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)
}
