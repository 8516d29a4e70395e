"""The adapters of a bank in a checkpoint of `torch.distributed.checkpoint`, which ranks write and read together.

Each tensor is there once, by the name of its adapter and of its buffer; what else is known of an adapter is JSON, as a
tensor of bytes. Nothing but torch's own metadata is pickled.
"""

from __future__ import annotations

import json
import os
import urllib.parse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._config.base import AdapterConfig
from .files import restore
from .optimizers import RowOptimizer
from .record import parse_record, record_of
from .resident import Resident, own_generator
from .slots import Numbers, Slots

_NAMES = "names"
_AT_ONCE = 64
"""How many adapters are in host memory at one time while a checkpoint is read."""


class Read(NamedTuple):
    """An adapter of a checkpoint.

    Attributes:
        resident: The adapter, without a slot.
        numbers: Its numbers.
        generators: The states of its generator by rank.
    """

    resident: Resident
    numbers: Numbers
    generators: dict[int, Tensor]


def tensors_of(resident: Resident, numbers: Numbers) -> dict[str, Tensor]:
    """Return the tensors of an adapter that one rank writes for all."""
    own = {_key(resident.name, buffer): value for buffer, value in numbers.items()}
    return {**own, _key(resident.name, "record"): _as_bytes(record_of(resident))}


def generator_of(resident: Resident, rank: int) -> dict[str, Tensor]:
    """Return the state of an adapter's generator on one rank, which that rank writes."""
    return {_key(resident.name, f"generator.{rank}"): resident.generator.get_state()}


def new_directory(path: str | os.PathLike[str]) -> Path:
    """Return a directory for a checkpoint, which has none: writing over one could leave a mixture of both.

    Raises:
        FileExistsError: It has one.
    """
    if (Path(path) / ".metadata").exists():
        raise FileExistsError(
            f"{path}: has a checkpoint, and a crash would leave a mixture of two; save into a new directory, and "
            "remove this one afterwards"
        )
    return Path(path)


def write_checkpoint(
    path: Path, names: Sequence[str], tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write what each rank has of a bank; all ranks call it."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if dist.get_rank(group) == 0:
        tensors = {**tensors, _NAMES: _as_bytes(json.dumps([*names]))}
    save(tensors, storage_writer=FileSystemWriter(path, overwrite=False), process_group=group)


def read_checkpoint(path: Path, slots: Slots, default: RowOptimizer, optimizer: RowOptimizer | None) -> Iterator[Read]:
    """Read the adapters of a checkpoint one by one, each rank by itself; nothing of the bank changes.

    Raises:
        FileNotFoundError: No checkpoint.
        ValueError: One of something else, or of adapters that the bank has no room for; names the adapter.
    """
    shapes = _shapes(path)
    if _NAMES not in shapes:
        raise ValueError(f"{path}: is no checkpoint of a bank, expected one that save_checkpoint wrote")
    names = json.loads(_text(_load(path, {_NAMES: shapes[_NAMES]})[_NAMES]))
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        own = {name: {key: empty for key, empty in shapes.items() if key.startswith(_key(name, ""))} for name in part}
        loaded = _load(path, {key: empty for tensors in own.values() for key, empty in tensors.items()})
        for name, tensors in own.items():
            values = {key.removeprefix(_key(name, "")): loaded[key] for key in tensors}
            try:
                yield _read(name, values, slots, default, optimizer)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name!r} does not fit the bank: {error}") from error


def _read(
    name: str, values: dict[str, Tensor], slots: Slots, default: RowOptimizer, optimizer: RowOptimizer | None
) -> Read:
    record = parse_record(_text(values.pop("record")))
    prefix = "generator."
    generators = {int(k.removeprefix(prefix)): values.pop(k) for k in [*values] if k.startswith(prefix)}
    kind = slots.kinds.of(AdapterConfig.from_dict(record["config"]))
    resident = Resident(name, kind, default, own_generator(None, slots.device))
    restore(resident, record, generators[0], default, optimizer)
    resident.optimizer.check(slots.layout)
    slots.check(resident, {key: value for key, value in values.items() if key != "parameters"})
    return Read(resident, values, generators)


def _shapes(path: Path) -> dict[str, Tensor]:
    """Return an empty tensor for each that a checkpoint has."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not (path / ".metadata").exists():
        raise FileNotFoundError(f"{path}: has no checkpoint, or one whose writing was interrupted")
    known = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: torch.empty(value.size, dtype=value.properties.dtype, device="meta")
        for key, value in known.items()
        if isinstance(value, TensorStorageMetadata)
    }


def _load(path: Path, empty: dict[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: dict[str, Any] = {key: torch.empty_like(value, device="cpu") for key, value in empty.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads by itself
        load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def _key(name: str, buffer: str) -> str:
    return f"{urllib.parse.quote(name, safe='')}/{buffer}"


def _as_bytes(text: str) -> Tensor:
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return bytes(data.tolist()).decode()
