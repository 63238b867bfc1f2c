"""Tests of this folder need a GPU. The CPU engine answers for one in its process, so the driver itself is asked."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch._C._cuda_getDeviceCount() > 0:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
