"""Megatron's import for a plan, which parses flags and runs no model: less is imported, and nothing is lost by it."""

import contextlib
import gc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from megatron_hybrid.patches.patching import Value, replaced


class _Postponed(types.ModuleType):
    """A module that runs its code when an attribute is asked for that it does not have yet.

    ``importlib.util.LazyLoader`` would run it at any attribute, and torch asks all modules for ``__file__``
    (``inspect.getmodule``).
    """

    def __getattr__(self, name: str) -> Any:
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        assert self.__spec__ and self.__spec__.loader
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def postpone(name: str) -> None:
    """Lets ``import name`` succeed at once where it is installed and not imported yet (core/timers.py:13).

    wandb takes 0.7 s, and Megatron uses it where it logs alone. The module that is imported now is the one that is
    used later, so that nothing has to be restored.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Postponed
    sys.modules[name] = module


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection: 0.7 s of an import, which makes much that stays and little garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def plain_functions() -> contextlib.AbstractContextManager[None]:
    """On the CPU engine, leaves functions as they are where Megatron compiles them on import (core/jit.py:20).

    The engine has switched torch.compile off (``TORCHDYNAMO_DISABLE``), which then gives the function back as well, and
    imports its compiler to do so: 0.5 s.
    """
    from megatron_hybrid.patches import cpu

    return replaced("torch", "compile", Value(_as_it_is)) if cpu.is_active() else contextlib.nullcontext()


def _as_it_is(model: Callable | None = None, **options: Any) -> Callable:
    return (lambda function: function) if model is None else model
