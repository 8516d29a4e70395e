"""Where results go, and what stands beside them: the commit and the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def write(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json`, with the commit and the machine added."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({**result, **_origin()}, indent=2) + "\n")


def _origin() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    return {
        "commit": run.stdout.strip() or "unknown",
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
