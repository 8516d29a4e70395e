"""The file of an adapter's numbers: tensors by name, and a record of what else a bank knows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files.disk.config_file import about
from .._files.disk.folder import sync, temporary
from .resident import Resident

_FORMAT = "bank 1"
_GENERATOR = "generator"
_OTHER = "is no adapter's state of a bank, expected one that bank.save wrote"


def to_bytes(resident: Resident, numbers: dict[str, Tensor]) -> bytes:
    """Return a safetensors file of an adapter's numbers, with its generator's state and its record."""
    tensors = {**numbers, _GENERATOR: resident.generator.get_state()}
    metadata = {"record": record_of(resident)}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def record_of(resident: Resident) -> str:
    """Return what else a bank knows of an adapter, as JSON."""
    record = {
        "format": _FORMAT,
        "name": resident.name,
        "config": resident.kind.config.to_dict(),
        "optimizer": resident.optimizer.name,
        "hyper": dict(resident.optimizer.hyper),
        "steps": resident.steps,
        "pending": resident.pending,
        "by_tokens": resident.by_tokens,
    }
    return json.dumps(record, sort_keys=True, default=str)


def facts_of(resident: Resident) -> dict[str, Any]:
    """Return what must be the same on all ranks that have an adapter, by names for errors."""
    optimizer, config = resident.optimizer, resident.kind.config
    fields = {f"{type(config).__name__}.{name}": value for name, value in config.to_dict().items()}
    return {"name": resident.name, "optimizer": (optimizer.name, dict(optimizer.hyper)), **fields}


def write_file(file: Path, data: bytes) -> None:
    """Replace a file: whatever happens, it is the old one or the new one.

    Raises:
        OSError: A file that cannot be written.
    """
    with temporary(file.parent, file.name, data) as new:
        new.replace(file)
        sync(file.parent)


def read_record(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Read an adapter's record, its numbers, and its generator's state.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is damaged, or none of a bank's; names it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("record", "null")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: is damaged: {error}") from error
    if _GENERATOR not in tensors:
        raise ValueError(f"{file}: {_OTHER}")
    with about(file):
        record = parse_record(text)
    return record, tensors, tensors.pop(_GENERATOR)


def parse_record(text: str) -> dict[str, Any]:
    """Return what else a bank knew of an adapter, from JSON.

    Raises:
        ValueError: Something else.
    """
    record = json.loads(text)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(_OTHER)
    return record
