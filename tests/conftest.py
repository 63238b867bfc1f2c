"""Settings of all tests, and the processes and parsers that they share."""

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_hybrid.cli.config import HybridConfig, IntraConfig
from tests.support import interpreted_tests
from tests.support.ranks import Ranks
from tests.support.training import folder, initial_checkpoint, losses

ROOT = Path(__file__).resolve().parents[1]

# an example that takes longer on a busy machine is no failure
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# what tests start as programs is this checkout, also where .venv has another one installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# a shell gives programs in its background no Ctrl-C, and they would give none to those that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    interpreted_tests.configure(config)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    return interpreted_tests.run_elsewhere(item, nextitem) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests run in the ranks come first: they take longest, and one at the end would leave a core idle."""
    with_ranks = {item.path for item in items if "ranks" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in with_ranks)


@pytest.fixture(scope="session")
def parser():
    """Megatron's own parser with our flags beside its own, as the entry point builds it."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    made = add_megatron_arguments(made)
    for config in (HybridConfig, IntraConfig):
        ArgumentGroupFactory(config).build_group(made, config.__name__)
    return made


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
