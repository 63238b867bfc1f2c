"""tools/benchmarks/attention.py needs a GPU."""

import os

import pytest
import torch

from tests.support.processes import ROOT, python


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    done = python("tools/benchmarks/attention.py", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr
