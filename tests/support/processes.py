"""Tools and lines of Python in processes of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BOUND_S = 300
"""A start takes seconds, and many times as long on a busy machine; beyond this a process is taken to hang."""


def tool(name: str, *words: Any, **options: Any) -> subprocess.CompletedProcess:
    """Runs tools/NAME.py to its end, in text; ``options`` are those of subprocess.run."""
    return python(ROOT / "tools" / f"{name}.py", *words, **options)


def python(*words: Any, **options: Any) -> subprocess.CompletedProcess:
    """Runs Python in the root of the project to its end, in text; ``options`` are those of subprocess.run."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": BOUND_S} | options)
