"""Configurations that mamba_ssm's kernels have chosen by trial, kept for the next process.

Each of its kernels tries all its configurations at its first call in a process, for minutes in total. A benchmark that
starts several processes lets the first one try, and gives its choices to the others. Nothing else reads them.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "mamba_ssm.ops.triton"


def tuners() -> Iterator[tuple[str, Any]]:
    """Name and Triton's ``Autotuner`` of each kernel of mamba_ssm that this process has imported."""
    for module in [name for name in sys.modules if name.startswith(PACKAGE)]:
        for name, found in vars(sys.modules[module]).items():
            while hasattr(found, "fn"):  # decorators of a kernel, one in another
                if hasattr(found, "configs") and hasattr(found, "cache"):
                    yield f"{module}.{name}", found
                found = found.fn


def save(path: Path) -> int:
    """Writes what this process has chosen; returns the number of choices."""
    chosen = {
        name: {repr(key): _spelt(config) for key, config in tuner.cache.items()}
        for name, tuner in tuners()
        if tuner.cache
    }
    path.write_text(json.dumps(chosen, indent=1) + "\n")
    return sum(map(len, chosen.values()))


def load(path: Path) -> int:
    """Takes over choices, where the kernel still has the configuration; returns their number."""
    chosen, count = json.loads(path.read_text()), 0
    for name, tuner in tuners():
        known = {_spelt(config): config for config in tuner.configs}
        for key, spelt in chosen.get(name, {}).items():
            if spelt in known:
                tuner.cache[ast.literal_eval(key)] = known[spelt]
                count += 1
    return count


def _spelt(config: Any) -> str:
    return f"{sorted(config.kwargs.items())} warps {config.num_warps} stages {config.num_stages}"
