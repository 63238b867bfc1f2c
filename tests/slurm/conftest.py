"""One cluster, one corpus and one run without SLURM for the whole suite."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.corpora import random_tokens
from tests.slurm.cluster import ROOT, Cluster, outside
from tests.slurm.runs import NODES, flags, steps


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Nothing is passed over in silence: a skipped test is a failed one."""
    report = (yield).get_result()
    if report.skipped:
        report.outcome = "failed"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes, n1 and n2."""
    running = Cluster.start(tmp_path_factory.mktemp("cluster"), nodes=2)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Prefix of a data set of random tokens, and beside it the cache of its indices."""
    return random_tokens(tmp_path_factory.mktemp("data"), documents=1000, name="corpus_text_document")


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory) -> dict[int, tuple]:
    """Iteration to loss, gradient norm and learning rate of a run of the same layout, that torchrun alone started."""
    where = tmp_path_factory.mktemp("undisturbed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NODES)]
    command = [*torchrun, "pretrain_hybrid.py", *flags(data), "--save", str(where)]
    done = subprocess.run(
        command, cwd=ROOT, env=outside() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = steps(where)
    shutil.rmtree(where)
    return found
