"""One set of processes for each world size, shared by all cases."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(n)``: n processes that run functions together."""
    started: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        return started.setdefault(size, Ranks(size))

    yield of
    for pool in started.values():
        pool.close(politely=True)
