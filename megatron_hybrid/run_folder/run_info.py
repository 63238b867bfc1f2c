"""run.json: what a run is. Megatron's rank 0 writes it when training starts (:func:`.engine.training.write_run`)."""

import json
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
