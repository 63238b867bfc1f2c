"""How a run ends: what a signal to all processes of a rank leaves alive."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """if True:
    import multiprocessing, os, signal
    from megatron_hybrid.patches import child_processes

    if __name__ == "__main__":
        child_processes.block_sigterm_in_children()
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        queue = multiprocessing.get_context("spawn").Manager().Queue()
        os.killpg(0, signal.SIGTERM)
        queue.put("saved")
        print(len(got), queue.get(), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.parametrize("blocked", [True, False])
def test_a_signal_to_all_processes_leaves_the_helpers_that_a_save_needs(blocked):
    code = CODE if blocked else CODE.replace("child_processes.block_sigterm_in_children()", "pass")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, process_group=0
    )
    if blocked:
        assert (done.stdout, done.stderr, done.returncode) == ("1 saved set()\n", "", 0)
    else:  # Python's own way, which is why there is another
        assert (done.stdout, done.returncode) == ("", 1)


FAILING = """if True:
    import signal, sys
    from argparse import Namespace
    import torch
    from megatron.training.dist_signal_handler import DistributedSignalHandler
    from megatron_hybrid.training import ending

    def ignore_sigterm(worker):
        DistributedSignalHandler(signal.SIGTERM).__enter__()

    batches = iter(torch.utils.data.DataLoader(range(99), num_workers=2, worker_init_fn=ignore_sigterm))
    args = Namespace(rank=1)
    with ending.state_of_the_run(None, args):
        next(batches)
        args.batches = batches  # a traceback holds it
        raise OSError("the disk is full")
"""


def test_a_rank_that_fails_does_not_wait_for_children_that_ignore_sigterm():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", FAILING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, process_group=0)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("OSError: the disk is full")


FINISHED = """if True:
    import multiprocessing, signal, sys, time
    from argparse import Namespace
    from megatron_hybrid.patches import child_processes
    from megatron_hybrid.training import ending

    def wait():
        time.sleep(300)

    if __name__ == "__main__":
        child_processes.block_sigterm_in_children()
        worker = multiprocessing.get_context("fork").Process(target=wait, daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        worker.start()
        with ending.state_of_the_run(None, Namespace(rank=1, skip_train=False, train_iters=1)):
            if sys.argv[1] == "stopped":
                sys.exit(0)
"""


@pytest.mark.parametrize("how", ["finished", "stopped"])
def test_a_rank_that_ends_in_order_does_not_wait_for_a_worker_that_was_never_used(how):
    """As that of background saves of a run that has nothing to save: it ignores SIGTERM, and upstream leaves it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FINISHED, how], env=environment, timeout=300)
    assert done.returncode == 0


ORPHAN = """if True:
    import multiprocessing, os, signal
    from megatron_hybrid.patches import child_processes

    if __name__ == "__main__":
        child_processes.block_sigterm_in_children()
        manager = multiprocessing.get_context("spawn").Manager()
        print(manager._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_killed_leaves_no_helper():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ORPHAN], env=environment, capture_output=True, text=True, timeout=300)
    helper = Path("/proc", done.stdout.strip())
    deadline = time.monotonic() + 300
    while helper.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done.returncode == -9 and done.stdout and not helper.exists()
