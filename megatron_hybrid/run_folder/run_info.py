"""run.json: what a run is. Rank 0 writes it when training starts."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any


def read_run_info(run: Path) -> dict[str, Any]:
    """What run.json says; nothing if it is missing or not whole.

    Keys: recipe, pattern, parameters_total, parameters_active, device, processes, args (all flags).
    """
    try:
        info = json.loads((run / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def write_run(path: Path, args: Namespace, counted: dict[str, Any]) -> None:
    """Writes what the run is, for people and tools: by rank 0, to a temporary name first.

    Args:
        path: The JSON file.
        args: Validated arguments; all that JSON can hold are stored.
        counted: Derived figures (parameters, FLOPs ...), stored with them.
    """
    if args.rank != 0:
        return
    flags = {k: v for k, v in sorted(vars(args).items()) if isinstance(v, (str, int, float, bool, list, type(None)))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**counted, "args": flags}, indent=1, default=str) + "\n")
    temporary.replace(path)
