"""Tables of patches: what is put in place of Megatron's and torch's own code, in order, and taken back in reverse.

No other room assigns into Megatron or torch. A table is installed as a whole or not at all.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """A row: one attribute of a module or a class of Megatron or torch."""

    owner: Any
    """``package.module``, ``package.module:Class``, or the object itself."""
    name: str
    make: Callable[[Any], Any]
    """What is there to what takes its place: a wrapper, or :class:`Value`."""
    reason: str
    upstream: str = ""
    """file:line under ``megatron/`` of the code that the patch answers; the CPU engine, which answers calls from
    everywhere, has none."""
    adds: bool = False
    """The attribute is a new one."""
    contract: str = ""
    """Name of its entries in tests/patches, which hold the upstream code that it relies on; the default is that of
    ``make``."""


@dataclass(frozen=True)
class Value:
    """A replacement that does not need what it replaces."""

    value: Any

    def __call__(self, there: Any) -> Any:
        return self.value


@dataclass(frozen=True)
class Table:
    """Patches that belong together."""

    name: str
    rows: tuple[Patch, ...]
    """In the order in which they are applied: of two rows on one attribute the later one wraps the earlier one."""
    after: tuple[str, ...] = ()
    """Tables that must be there first. Two tables may patch one attribute only where one of them names the other."""
    of_run: bool = False
    """Holds callables of one run: :func:`uninstall_run` takes it back."""


class _Applied(NamedTuple):
    row: Patch
    owner: Any
    put: Any
    kept: Any
    """What was there, or :data:`_NOTHING` where the attribute is inherited or new."""


@dataclass
class _Installed:
    table: Table
    applied: list[_Applied] = field(default_factory=list)


_NOTHING = object()
_installed: dict[str, _Installed] = {}
"""By name, in the order of installation."""


def install(table: Table) -> None:
    """Applies a table. Installing the same rows again does nothing, so that a process may be prepared twice.

    Raises:
        RuntimeError: Other rows are installed under its name; a table of ``after`` is not; an attribute is patched by a
            table that is not in ``after``; or an attribute is gone upstream. Nothing is changed then.
    """
    there = _installed.get(table.name)
    if there is not None:
        if there.table.rows == table.rows:
            return
        raise RuntimeError(f"the patches of {table.name!r} are installed with other replacements: uninstall them first")
    missing = [name for name in table.after if name not in _installed]
    if missing:
        raise RuntimeError(f"the patches of {table.name!r} come after those of {missing[0]!r}, which are not installed")
    new = _Installed(table)
    try:
        for row in table.rows:
            new.applied.append(_apply(table, row))
    except BaseException:
        _take_back(new)
        raise
    _installed[table.name] = new


def is_installed(name: str) -> bool:
    """Whether the table of this name is installed in this process."""
    return name in _installed


def uninstall(name: str) -> None:
    """Puts back what a table has replaced; does nothing if it is not installed.

    Raises:
        RuntimeError: An attribute was replaced again since, by a later table or by others. Nothing is changed then.
    """
    there = _installed.get(name)
    if there is None:
        return
    last = {(id(one.owner), one.row.name): one for one in there.applied}
    for one in last.values():
        if vars(one.owner).get(one.row.name) is not one.put:
            what = f"{_spelt(one.row.owner)}.{one.row.name}"
            raise RuntimeError(f"{what} was replaced after the patches of {name!r}: take that back first")
    _take_back(there)
    del _installed[name]


def uninstall_run() -> None:
    """Takes back the tables of a run, the last one first: the next run in this process installs its own."""
    for name in [name for name, there in reversed(_installed.items()) if there.table.of_run]:
        uninstall(name)


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """One attribute replaced while the block runs. Arguments as in :class:`Patch`."""
    applied = _replace(Patch(owner, name, make, "for the length of a call"))
    try:
        yield
    finally:
        _put_back(applied)


def _apply(table: Table, row: Patch) -> _Applied:
    owner = _object(row.owner)
    for other in _installed.values():
        taken = any(one.owner is owner and one.row.name == row.name for one in other.applied)
        if taken and other.table.name not in table.after:
            raise RuntimeError(
                f"{_spelt(row.owner)}.{row.name} is patched by {other.table.name!r}, and the patches of {table.name!r} "
                "are not said to come after those"
            )
    return _replace(row)


def _replace(row: Patch) -> _Applied:
    owner = _object(row.owner)
    if row.adds == hasattr(owner, row.name):
        raise RuntimeError(f"{_spelt(row.owner)} has {'a' if row.adds else 'no'} {row.name}: it has changed upstream")
    kept = vars(owner).get(row.name, _NOTHING)
    setattr(owner, row.name, row.make(getattr(owner, row.name, None)))
    return _Applied(row, owner, vars(owner)[row.name], kept)


def _put_back(one: _Applied) -> None:
    if one.kept is _NOTHING:
        delattr(one.owner, one.row.name)
    else:
        setattr(one.owner, one.row.name, one.kept)


def _take_back(there: _Installed) -> None:
    for one in reversed(there.applied):
        _put_back(one)


def _object(owner: Any) -> Any:
    if not isinstance(owner, str):
        return owner
    module, _, path = owner.partition(":")
    # not by attributes: some packages have a function of the name of a module
    found: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def _spelt(owner: Any) -> str:
    return owner.replace(":", ".") if isinstance(owner, str) else getattr(owner, "__name__", repr(owner))
