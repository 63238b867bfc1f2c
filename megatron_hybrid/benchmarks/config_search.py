"""Searches lines of the table of Triton configurations (``kernels/triton/configs.py``) for one that is faster.

From the line that is there, each setting is varied alone, and tiles together with warps; the fastest is the next
start, until none is faster. Candidates are compiled by several processes into Triton's cache on disk before they are
timed. What counts is the time of all kernels of a forward and a backward pass, launches aside.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_hybrid.benchmarks.kernel_classes import Kernel, busy
from megatron_hybrid.benchmarks.mamba_cores import OURS, Core, Sizes, cores
from megatron_hybrid.kernels.triton.configs import TABLE

Line = dict[str, int]
Key = tuple[str, str]
LEAST = {"CHANNELS": 16, "TOKENS": 16, "PROGRAMS": 64, "num_warps": 1, "num_stages": 1, "STAGES": 1}
MOST = {"CHANNELS": 256, "TOKENS": 512, "PROGRAMS": 4096, "num_warps": 16, "num_stages": 5, "STAGES": 5}
DOUBLED = ("CHANNELS", "TOKENS", "PROGRAMS", "num_warps")
"""Settings that are powers of 2; others change by 1."""
REGISTERS = (0, 64, 96, 128, 168)
"""Values of ``maxnreg``; 0 for no bound."""
GAIN = 0.005
"""Of the whole time: what a line must be faster by to take another's place."""


def neighbours(line: Line) -> list[Line]:
    """Lines that differ in one setting by a step, or in tile and warps by a step each."""
    found = [{**line, name: value} for name in line for value in _steps(name, line[name])]
    for tile in [name for name in ("CHANNELS", "TOKENS") if name in line]:
        pairs = itertools.product(_steps(tile, line[tile]), _steps("num_warps", line["num_warps"]))
        found += [{**line, tile: a, "num_warps": b} for a, b in pairs]
    return [{name: value for name, value in other.items() if name != "maxnreg" or value} for other in found]


def _steps(name: str, value: int) -> list[int]:
    if name == "maxnreg":
        return [bound for bound in REGISTERS if bound != value]
    if name not in LEAST:
        return []
    steps = [value // 2, value * 2] if name in DOUBLED else [value - 1, value + 1]
    return [step for step in steps if LEAST[name] <= step <= MOST[name]]


def search(
    sizes: Sizes, keys: Sequence[Key], dtype: torch.dtype, workers: int, folder: Path, say: Callable[[str], None]
) -> dict[Key, Line]:
    """The fastest line that was found for each key; :data:`TABLE` has them afterwards.

    Args:
        sizes: At which candidates are timed.
        keys: Of the table.
        workers: Processes that compile.
        folder: For what the processes are told.
    """
    (core,) = [core for core in cores(sizes, torch.device("cuda"), dtype) if core.name == OURS]
    best = kernel_ms(core)
    say(f"the table as it is: {best:.3f} ms of kernels")
    wanted = core.both()
    # what every key begins with, at once: the processes take longer to start than to compile
    compile_all([(key, line) for key in keys for line in neighbours(dict(TABLE[key]))], sizes, dtype, workers, folder)
    for key in keys:
        line = first = dict(TABLE[key])
        seen = [first]
        while True:
            new = [other for other in neighbours(line) if other not in seen]
            seen += new
            if line != first:
                compile_all([(key, other) for other in new], sizes, dtype, workers, folder)
            times = [(_timed(core, key, other, wanted), i) for i, other in enumerate(new)]
            ms, i = min(times, default=(best, 0))
            if ms > (1 - GAIN) * best:
                break
            say(f"{key[0]}: {new[i]} {ms:.3f} ms, before {best:.3f} ms")
            best, line = ms, new[i]
            TABLE[key] = line
        TABLE[key] = line
        say(shown(key, line))
    return {key: dict(TABLE[key]) for key in keys}


def shown(key: Key, line: Line) -> str:
    """A line as the table has it."""
    settings = ", ".join(f'"{name}": {value}' for name, value in line.items())
    return f'    ("{key[0]}", "{key[1]}"): {{{settings}}},'


def _timed(core: Core, key: Key, line: Line, wanted: Sequence[torch.Tensor]) -> float:
    """Milliseconds with a line in the table; infinite where it does not run, or gives something else."""
    before = TABLE[key]
    TABLE[key] = line
    try:
        for got, known in zip(core.both(), wanted, strict=True):
            if not ((got - known).abs().max() <= 0.02 * known.abs().max()):
                return float("inf")
        return kernel_ms(core)
    except Exception:  # too much shared memory, too few registers: whatever Triton says
        return float("inf")
    finally:
        TABLE[key] = before


def kernel_ms(core: Core, rounds: int = 3, repeats: int = 3) -> float:
    """Milliseconds of the kernels of a forward and a backward pass: the fastest of the rounds."""
    core.both()
    found = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                core.both()
            torch.cuda.synchronize()
        events = profile.profiler.kineto_results.events()
        on_gpu = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
        found.append(busy(Kernel(e.name(), e.start_ns(), e.duration_ns()) for e in on_gpu) / repeats / 1e6)
    return min(found)


# Compilation in several processes ----------------------------------------------------------------


def compile_all(
    candidates: Sequence[tuple[Key, Line]], sizes: Sizes, dtype: torch.dtype, workers: int, folder: Path
) -> None:
    """Compiles lines into Triton's cache on disk; those that cannot be compiled are found out when they are timed."""
    started = []
    for i in range(min(workers, len(candidates))):
        file = folder / f"compile_{i}.json"
        told = {"sizes": asdict(sizes), "dtype": str(dtype).removeprefix("torch."), "lines": candidates[i::workers]}
        file.write_text(json.dumps(told))
        command = [sys.executable, "-m", "megatron_hybrid.benchmarks.config_search", str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for process in started:
        process.wait()


def main(file: Path) -> None:
    """Runs each line once at a short length: what is compiled does not depend on that."""
    told = json.loads(file.read_text())
    sizes = replace(Sizes(**told["sizes"]), length=1024)
    (core,) = [c for c in cores(sizes, torch.device("cuda"), getattr(torch, told["dtype"])) if c.name == OURS]
    for key, line in told["lines"]:
        before = TABLE[tuple(key)]
        TABLE[tuple(key)] = line
        try:
            core.both()
        except Exception as error:
            print(key, line, error)
        finally:
            TABLE[tuple(key)] = before


if __name__ == "__main__":
    main(Path(sys.argv[1]))
