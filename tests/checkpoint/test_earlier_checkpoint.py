"""A checkpoint that an earlier version wrote goes on here as it went on there: losses and norms are bitwise identical.

``fixtures/earlier_checkpoint/run.tar.xz`` holds iteration 3 of a run with every layer symbol and a prediction head;
``expected.json`` has its flags and what the version that wrote it found in the three steps behind it. Both were made by
``pretrain_hybrid.py FLAGS --save RUN --save-interval 3 --exit-interval 3``, then with ``--load RUN``.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests.support import program

FIXTURE = Path(__file__).parents[1] / "fixtures/earlier_checkpoint"


def capability() -> str:
    """Of the CPU: other instructions round otherwise."""
    return torch.backends.cpu.get_cpu_capability()


def test_steps_are_those_of_the_version_that_wrote_it(ranks, tmp_path):
    with tarfile.open(FIXTURE / "run.tar.xz") as packed:
        packed.extractall(tmp_path / "run", filter="data")
    expected = json.loads((FIXTURE / "expected.json").read_text())
    argv = (
        f"{expected['flags']} --load {tmp_path}/run --save {tmp_path}/run --save-interval 100 --num-workers 0".split()
    )
    ranks(1).run(program.train, argv=argv)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = {str(r["iteration"]): r for r in records if "grad_norm" in r}
    assert list(found) == list(expected["steps"])
    for step, values in expected["steps"].items():
        for name, value in values.items():
            close = value if capability() == expected["cpu_capability"] else pytest.approx(value, rel=1e-5)
            assert found[step][name] == close, (step, name)
