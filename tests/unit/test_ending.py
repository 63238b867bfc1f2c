"""How a run ends: what a signal to all processes of a rank leaves alive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """if True:
    import multiprocessing, os, signal
    from megatron_hybrid.engine import ending

    if __name__ == "__main__":
        ending.spare_helpers_the_signal()
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        queue = multiprocessing.get_context("spawn").Manager().Queue()
        os.killpg(0, signal.SIGTERM)
        queue.put("saved")
        print(len(got), queue.get(), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.parametrize("spared", [True, False])
def test_a_signal_to_all_processes_leaves_the_helpers_that_a_save_needs(spared):
    code = CODE if spared else CODE.replace("ending.spare_helpers_the_signal()", "pass")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, process_group=0
    )
    if spared:
        assert (done.stdout, done.stderr, done.returncode) == ("1 saved set()\n", "", 0)
    else:  # Python's own way, which is why there is another
        assert (done.stdout, done.returncode) == ("", 1)
