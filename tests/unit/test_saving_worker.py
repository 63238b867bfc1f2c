"""The process that saves in the background on GPUs: its death is noticed. Here it is forked and the CPU's."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """if True:
    import os, signal, time
    from megatron_hybrid.engine import cpu, saving
    cpu.install()
    import torch
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

    saving.notice_a_dead_worker()
    AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="fork", cpu_priority=-1)
    queue, done = AsyncCallsQueue(persistent=True), []
    queue.schedule_async_request(AsyncRequest(time.sleep, (0.5,), [lambda: done.append("saved")]))
    queue.maybe_finalize_async_calls(blocking=False)
    print(done)
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
    """Without the hook both waits would go on for ever; upstream_contracts.py holds that against its source."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    said = "the process that saves checkpoints died (exit code -9)"
    assert done.stdout == f"[]\n['saved']\nFalse {said}\nTrue {said}\n", done.stderr
