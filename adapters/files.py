"""Adapters in files, as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .config import AdapterConfig

CONFIG_NAME = "adapter_config.json"


def save_config(config: AdapterConfig, directory: str | os.PathLike[str]) -> None:
    """Write `adapter_config.json` into a directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    fields = config.to_dict() | {"inference_mode": True}
    (Path(directory) / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True))


def load_config(directory: str | os.PathLike[str], subfolder: str | None = None) -> AdapterConfig:
    """Read `adapter_config.json` from a directory."""
    return AdapterConfig.from_dict(json.loads((Path(directory) / (subfolder or "") / CONFIG_NAME).read_text()))
