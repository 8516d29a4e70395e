"""An adapter of a bank in files: PEFT's pair, and the state beside it under the digest of the weights it belongs to.

Three files cannot be replaced in one step. The state is written first, under the digest of the new weights; then the
pair is replaced, as a whole or not at all; then states of other weights go. Whatever a reader finds as the pair, the
state of the same digest is its own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchgraft.functional.extending import Tree

from .._files.configs import load_config
from .._files.disk.config_file import about, make_folder
from .._files.disk.folder import WEIGHTS, find_folder, write_pair
from .._files.load import load_adapter
from .._files.save import as_bytes
from .muon import BY_NAME
from .optimizers import RowOptimizer
from .record import read_record, to_bytes, write_file
from .resident import Resident, own_generator
from .slots import Numbers, Slots

_STATE = re.compile(r"bank_state\.[0-9a-f]{64}\.safetensors")
_TRIES = 20


def save_resident(path: str | os.PathLike[str], resident: Resident, params: Tree, numbers: Numbers) -> Path:
    """Write an adapter into a directory, as `Bank.save` does."""
    numbers = {name: value for name, value in numbers.items() if name != "parameters"}
    config, weights, _ = as_bytes(resident.kind.graft, params=params)
    folder = make_folder(path)
    state = _state_of(folder, hashlib.sha256(weights).hexdigest())
    write_file(state, to_bytes(resident, numbers))
    write_pair(folder, config, weights)
    for other in folder.iterdir():
        if _STATE.fullmatch(other.name) and other != state:
            other.unlink(missing_ok=True)
    return folder


def load_resident(
    path: str | os.PathLike[str], name: str, slots: Slots, default: RowOptimizer, optimizer: RowOptimizer | None
) -> tuple[Resident, Tree, Numbers]:
    """Read an adapter from a directory, as `Bank.load` does; nothing of the bank changes.

    Returns:
        The adapter without a slot, its parameters, and its other numbers; none where there is no state.
    """
    for _ in range(_TRIES):
        folder = find_folder(path, "default").path
        digest = _digest(folder)
        config = load_config(folder)
        with about(folder / "adapter_config.json"):
            kind = slots.kinds.of(config)
        like = slots.state.parameters
        params = load_adapter(kind.graft, folder, dtype=like.dtype, device=like.device)
        state = _state_of(folder, digest)
        try:
            found = read_record(state) if state.exists() else None
        except FileNotFoundError:
            continue  # replaced since
        if _digest(folder) == digest:
            break
    else:
        raise RuntimeError(f"{path}: is replaced again and again; load it when nothing writes to it")
    resident = Resident(name, kind, default if optimizer is None else optimizer, own_generator(None, slots.device))
    if found is None:
        resident.optimizer.check(slots.layout)
        return resident, params, {}
    record, numbers, generator = found
    with about(state):
        restore(resident, record, generator, default, optimizer)
        resident.optimizer.check(slots.layout)
        slots.check(resident, numbers)
    return resident, params, numbers


def restore(
    resident: Resident,
    record: Mapping[str, Any],
    generator: torch.Tensor,
    default: RowOptimizer,
    given: RowOptimizer | None,
) -> None:
    """Make an adapter what a record says of it."""
    saved = record["optimizer"]
    hyper = {key: tuple(value) if isinstance(value, list) else value for key, value in record["hyper"].items()}
    if given is not None:
        if given.name != saved:
            raise ValueError(
                f"it was trained by {saved!r}, and optimizer is {given.name!r}; leave optimizer out, or load only the "
                "parameters: bank.add(name, config, params=load_adapter(graft, path), optimizer=...)"
            )
    elif saved in BY_NAME:
        resident.optimizer = BY_NAME[saved](**hyper)
    elif default.name != saved:
        raise ValueError(f"it was trained by {saved!r}, which is no optimizer of this library; give it as optimizer=")
    else:
        resident.optimizer = default.with_hyper(hyper)
    resident.steps, resident.pending = int(record["steps"]), bool(record["pending"])
    resident.by_tokens = bool(record["by_tokens"])
    resident.generator.set_state(generator)


def _state_of(folder: Path, digest: str) -> Path:
    return folder / f"bank_state.{digest}.safetensors"


def _digest(folder: Path) -> str:
    with open(folder / WEIGHTS, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
