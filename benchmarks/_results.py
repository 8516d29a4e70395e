"""Where results go, and what stands beside them: the commit and the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_FOLDERS = [Path(__file__).parent / "results"]


def apart() -> None:
    """Keep what a quick run finds apart from the results: in `results/quick`, which is no part of the repository."""
    _FOLDERS.append(_FOLDERS[0] / "quick")


def folder() -> Path:
    """Where results go."""
    _FOLDERS[-1].mkdir(parents=True, exist_ok=True)
    return _FOLDERS[-1]


def write(name: str, result: dict[str, Any]) -> None:
    """Write `<name>.json`, with the commit and the machine added."""
    (folder() / f"{name}.json").write_text(json.dumps({**result, **_origin()}, indent=2) + "\n")


def _origin() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "commit": run.stdout.strip() or "unknown",
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
