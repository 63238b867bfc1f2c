"""What unit tests share."""

import argparse
import os

import pytest

from megatron_hybrid.config import HybridConfig, IntraConfig


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
