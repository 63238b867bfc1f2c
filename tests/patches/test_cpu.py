"""The CPU engine. As a program, this file reports on a process where nothing is installed yet."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import Run

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints as JSON what the CPU engine finds and does in a fresh process."""
    import torch
    from torch.overrides import _get_current_function_mode_stack

    from megatron_hybrid.patches import cpu

    result: dict[str, Any] = {"before": cpu.is_active()}
    result["missing"] = [name for owner, name, _, _ in cpu.REPLACED if not hasattr(owner, name)]
    result["without reason"] = [name for _, name, _, reason in cpu.REPLACED if len(reason) < 5]
    rows = [(str(owner), name) for owner, name, _, _ in cpu.REPLACED]
    result["twice in the table"] = [row for row in set(rows) if rows.count(row) > 1]

    is_initialized, to_cuda = torch.cuda.is_initialized, torch.Tensor.cuda
    torch.cuda.is_initialized = lambda: True
    try:
        cpu.install()
        result["initialised"] = "accepted"
    except RuntimeError as error:
        result["initialised"] = str(error)
    result["untouched after refusal"] = torch.Tensor.cuda is to_cuda and not cpu.is_active()
    torch.cuda.is_initialized = is_initialized

    cpu.install()
    cpu.install()
    result["after"] = cpu.is_active()
    result["modes"] = len(_get_current_function_mode_stack())
    result["not replaced"] = [name for owner, name, new, _ in cpu.REPLACED if getattr(owner, name) is not new]
    print(json.dumps(result))


@pytest.fixture(scope="module")
def fresh():
    """What a process that has not installed the CPU engine reports (:func:`main`)."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.patches.test_cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_replaced_name_is_one_of_torch_with_a_reason(fresh):
    assert fresh["missing"] == []
    assert fresh["without reason"] == []
    assert fresh["twice in the table"] == []


def test_install_is_on_request_once_and_whole(fresh):
    assert (fresh["before"], fresh["after"]) == (False, True)
    assert fresh["modes"] == 1  # of two calls
    assert fresh["not replaced"] == []


def test_install_refuses_when_cuda_runs_already(fresh):
    assert "CUDA is already initialised" in fresh["initialised"]
    assert "--device cuda" in fresh["initialised"]
    assert fresh["untouched after refusal"]


def devices() -> dict[str, str]:
    """Where tensors land that are asked for on "cuda", by the way of asking."""
    import torch

    x = torch.ones(2)
    with torch.device("cuda"):
        in_context = torch.zeros(2)
    made = {
        "factory": torch.empty(2, device="cuda"),
        "index": torch.empty(2, device="cuda:0"),
        "object": torch.tensor([1.0], device=torch.device("cuda")),
        "object with index": torch.arange(3, device=torch.device("cuda", 0)),
        "current_device": torch.zeros(2, device=torch.cuda.current_device()),
        "context": in_context,
        "like": torch.zeros_like(x, device="cuda"),
        "new": x.new_empty(3, device="cuda"),
        "to": x.to("cuda"),
        "to keyword": x.to(device="cuda", dtype=torch.float64),
        "to object": x.to(torch.device("cuda"), non_blocking=True),
        "cuda": x.cuda(),
        "cuda with arguments": x.cuda(0, non_blocking=True),
        "module": torch.nn.Linear(2, 2, device="cuda").weight,
        "module.cuda": torch.nn.Linear(2, 2).cuda().weight,
        "module.to": torch.nn.Linear(2, 2).to("cuda").weight,
        "pin_memory": x.pin_memory(),
        "pin_memory keyword": torch.empty(2, pin_memory=True),
    }
    return {way: tensor.device.type for way, tensor in made.items()}


def test_tensors_asked_for_on_cuda_are_on_the_cpu(ranks):
    found = ranks(1).run(devices)[0]
    assert found == dict.fromkeys(found, "cpu")


def imitations() -> dict[str, Any]:
    """Events, streams and type names."""
    import time

    import torch

    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    time.sleep(0.02)
    second.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_event(torch.cuda.Stream().record_event())
    torch.cuda.synchronize()
    x = torch.zeros(2)
    return {
        "milliseconds": first.elapsed_time(second),
        "types": [x.type(), x.bfloat16().type(), torch.nn.Parameter(x.half()).type()],
        "converted": str(x.type(torch.float64).dtype),
        "cuda": torch.cuda.is_available(),
        "accelerator": torch.accelerator.is_available(),
    }


def test_events_streams_and_type_names(ranks):
    found = ranks(1).run(imitations)[0]
    assert 20 <= found["milliseconds"] < 20_000  # slept for 20 ms, on a machine that others use; no microseconds
    assert found["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor"]
    assert found["converted"] == "torch.float64"
    assert (found["cuda"], found["accelerator"]) == (True, False)


def random_streams() -> dict[str, bool]:
    """The host's and the device's random states: what changes which."""
    import torch

    def states() -> tuple[Any, Any]:
        return torch.get_rng_state().clone(), torch.cuda.get_rng_state().clone()

    def changed(action: Any) -> tuple[bool, bool]:
        torch.manual_seed(1)
        host, device = states()
        action()
        return not torch.equal(torch.get_rng_state(), host), not torch.equal(torch.cuda.get_rng_state(), device)

    torch.manual_seed(5)
    other = states()
    data = torch.utils.data.DataLoader([torch.zeros(1)] * 4, batch_size=2, shuffle=True)
    torch.manual_seed(1)
    drawn = torch.rand(3, device="cuda")
    torch.manual_seed(1)
    repeats = torch.equal(torch.rand(3), drawn)
    return {
        "manual_seed sets both": changed(lambda: torch.manual_seed(2)) == (True, True),
        "manual_seed repeats": repeats,
        "cuda.manual_seed sets the device": changed(lambda: torch.cuda.manual_seed(2)) == (False, True),
        "cuda.manual_seed_all too": changed(lambda: torch.cuda.manual_seed_all(2)) == (False, True),
        "draws move the device": changed(lambda: torch.rand(3)) == (False, True),
        "set_rng_state sets the host": changed(lambda: torch.set_rng_state(other[0])) == (True, False),
        "cuda.set_rng_state sets the device": changed(lambda: torch.cuda.set_rng_state(other[1])) == (False, True),
        "a data loader draws on the host": changed(lambda: list(data)) == (True, False),
        "and without shuffling": changed(lambda: iter(torch.utils.data.DataLoader([1, 2]))) == (True, False),
    }


def test_host_and_device_random_states_are_two(ranks):
    found = ranks(1).run(random_streams)[0]
    assert [what for what, holds in found.items() if not holds] == []


def tracker() -> dict[str, bool]:
    """Megatron's forked random states on the CPU engine."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    Run("M-", "--no-load-optim")  # process groups
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    host, device = torch.get_rng_state().clone(), torch.cuda.get_rng_state().clone()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    restored = torch.equal(torch.get_rng_state(), host) and torch.equal(torch.cuda.get_rng_state(), device)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    plain = torch.rand(4)
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(4)
    return {
        "both states are restored": restored,
        "a fork goes on where it stopped": not torch.equal(first, second),
        "the fork is a stream of its own": not torch.equal(first, plain),
        "the seed repeats it": torch.equal(first, again),
    }


def test_forked_random_states_restore_what_they_found(ranks):
    found = ranks(1).run(tracker)[0]
    assert [what for what, holds in found.items() if not holds] == []


if __name__ == "__main__":
    main()
