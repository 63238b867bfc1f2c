"""The process that saves in the background on GPUs: its death is noticed, and it does not outlive its rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_agent import alive

ROOT = Path(__file__).parents[2]
CODE = """if True:
    import os, signal, tempfile, time
    from megatron_hybrid.patches import child_processes, cpu
    cpu.install()
    import torch
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

    go = os.path.join(tempfile.mkdtemp(), "go")

    def wait_for(path):
        while not os.path.exists(path):
            time.sleep(0.02)

    child_processes.notice_a_dead_worker()
    AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="fork", cpu_priority=-1)
    queue, done = AsyncCallsQueue(persistent=True), []
    queue.schedule_async_request(AsyncRequest(wait_for, (go,), [lambda: done.append("saved")]))
    queue.maybe_finalize_async_calls(blocking=False)
    print(done)
    open(go, "w").close()
    queue.maybe_finalize_async_calls(blocking=True)
    print(done, flush=True)
    queue.schedule_async_request(AsyncRequest(time.sleep, (60,), []))
    os.kill(queue._get_async_caller().process.pid, signal.SIGKILL)
    for blocking in (False, True):
        try:
            time.sleep(1)
            queue.maybe_finalize_async_calls(blocking=blocking)
            print("went on", flush=True)
        except RuntimeError as error:
            print(blocking, error, flush=True)
    os._exit(0)
"""


def test_a_dead_worker_is_noticed():
    """Without the hook both waits would go on for ever; tests/patches holds that against its source."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = "the process that saves checkpoints died (exit code -9)"
    assert done.stdout == f"[]\n['saved']\nFalse {said}\nTrue {said}\n", done.stderr


FAILING = """if True:
    import os, time
    from argparse import Namespace
    from megatron_hybrid.patches import cpu
    from megatron_hybrid.training import ending
    cpu.install()
    import torch
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

    AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="fork", cpu_priority=-1)
    with ending.state_of_the_run(None, Namespace(rank=1)):
        AsyncCallsQueue(persistent=True).schedule_async_request(AsyncRequest(time.sleep, (300,), []))
        raise OSError("something else")
"""


def test_a_rank_that_fails_during_a_background_save_ends():
    """Upstream would wait for its worker as Python takes the rank apart, and the worker has been killed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILING], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("OSError: something else"), done.stderr


LEAVING = """
import os, signal, sys, time
from argparse import Namespace

def worker(*ignored):  # in place of upstream's, which wants a GPU
    time.sleep(600)

if __name__ == "__main__":
    from megatron_hybrid.patches import child_processes, cpu
    cpu.install()
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    from megatron.training import global_vars, initialize

    async_utils.PersistentAsyncCaller.async_loop = staticmethod(worker)
    child_processes.block_sigterm_in_children()
    child_processes.spawn_the_worker()
    global_vars.set_args(Namespace(async_strategy="mcore", async_ckpt_cpu_priority=10, async_ckpt_io_priority=None))
    initialize.init_persistent_async_worker(0, "forkserver")
    queue, worker = filesystem_async._results_queue, async_utils.PersistentAsyncCaller._persistent_process
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    try:
        queue.put("saved")
        said = queue.get()
    except (EOFError, OSError) as error:
        said = "lost"
    print(said, queue._manager._process.pid, worker.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("spawned", [True, False])
def test_the_processes_of_background_saves_live_through_the_signal_to_save_and_end_with_their_rank(spawned, tmp_path):
    program, output = tmp_path / "program.py", tmp_path / "output"  # what is spawned imports the program
    program.write_text(LEAVING if spawned else LEAVING.replace("child_processes.spawn_the_worker()", "pass"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", program]
    with output.open("wb") as stream:  # a pipe would be held open by what is left
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=stream, timeout=300, process_group=0)
    said, *pids = output.read_text().split()
    helpers = [int(pid) for pid in pids]
    left = outlived(helpers, 300.0 if spawned else 1.0)
    for helper in left:
        os.kill(helper, signal.SIGKILL)
    if spawned:
        assert (said, left) == ("saved", [])
    else:  # upstream's way, which is why there is another
        assert (said, left) == ("lost", helpers[1:])


def outlived(processes: list[int], seconds: float) -> list[int]:
    """Those that are still there after this time; less is waited for when none is."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in processes if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
