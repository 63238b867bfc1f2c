"""A save of 45 s ends in order, and torchrun, under which it would not, is still as it was."""

import inspect
import signal
import time

from tests.launch.test_agent import local  # noqa: F401  a fixture

SAVE_S = 45.0
"""More than the 30 s that torchrun gives its ranks."""


def test_torchrun_still_kills_after_30_s():
    from torch.distributed.elastic.multiprocessing.api import PContext

    assert inspect.signature(PContext.close).parameters["timeout"].default == 30 < SAVE_S


def test_a_save_of_45_s_is_not_cut(local, tmp_path):  # noqa: F811
    run = local("--grace", "90", SAVE_S=str(SAVE_S))
    for rank in (0, 1):
        run.pid(rank)
    run.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    said = run.process.communicate(timeout=120)[0]
    assert run.process.returncode == 0, said
    assert time.monotonic() - told > SAVE_S
    assert {path.name for path in tmp_path.glob("saved.*")} == {"saved.0", "saved.1"}
