"""Imports that Megatron makes and a plan does not use, postponed to their first use."""

import importlib.util
import sys
import types
from typing import Any


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
