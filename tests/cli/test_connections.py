"""What a rank tells CUDA before it starts."""

import subprocess
import sys

import pytest

from megatron_hybrid.cli.connections import NAME, set_connections


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--tensor-model-parallel-size 2", "1"),
        ("--tensor-model-parallel-size=2 --context-parallel-size 1", "1"),
        ("--context-parallel-size 2 --recipe demo", "1"),
        ("--tensor-model-parallel-size 2 --tensor-model-parallel-size 1", None),  # the last one counts
        ("--pipeline-model-parallel-size 2 --expert-model-parallel-size 2", None),
        ("", None),
    ],
)
def test_one_connection_where_megatron_asks_for_it(line, wanted):
    environment: dict[str, str] = {}
    notes = set_connections(line.split(), environment)
    assert environment.get(NAME) == wanted
    assert [NAME in note for note in notes] == [True] * (wanted is not None)


def test_what_the_user_has_set_stays():
    environment = {NAME: "8"}
    assert set_connections(["--tensor-model-parallel-size", "2"], environment) == []
    assert environment == {NAME: "8"}


def test_it_is_set_before_torch_asks_for_a_device():
    """The program's own order, on a machine that pretends to have a GPU."""
    program = """
import os, sys, torch
import pretrain_hybrid
from megatron_hybrid.cli import arguments
seen = []
def is_available():
    seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    return True
torch.cuda.is_available = is_available
def stop(argv, device, print_config=False, world=None):
    print(device, seen)
    sys.exit(0)
arguments.parse = stop
pretrain_hybrid.main("--recipe demo --tensor-model-parallel-size 2".split())
"""
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.strip() == "cuda ['1']", done.stderr[-500:]
