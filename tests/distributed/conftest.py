"""One set of processes for each world size, shared by all cases."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.training import folder, initial_checkpoint, losses


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(n)``: n processes that run functions together."""
    started: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        return started.setdefault(size, Ranks(size))

    yield of
    for pool in started.values():
        pool.close(politely=True)


@pytest.fixture(scope="session")
def reference(ranks, tmp_path_factory) -> Callable[..., tuple[str, list]]:
    """``reference(pattern, flags)``: a model's first weights, and one process's losses and norms."""
    known: dict[tuple[str, str], tuple[str, list]] = {}

    def of(pattern: str, flags: str = "") -> tuple[str, list]:
        if (pattern, flags) not in known:
            where = folder(tmp_path_factory.mktemp("weights"))
            ranks(1).run(initial_checkpoint, pattern=pattern, folder=where, flags=flags)
            known[pattern, flags] = where, ranks(1).run(losses, pattern=pattern, load=where, flags=flags)[0]
        return known[pattern, flags]

    return of
