"""The tensors of a model's files, safetensors in one file or in shards, of which one is in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .folder import WEIGHTS, Folder
from .headers import Spec, open_weights
from .strict_json import parse_object

INDEX = "model.safetensors.index.json"
"""What says which shard has which tensor."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """Tensors on a disk, by name; their files have sound headers.

    Attributes:
        path: The directory, or the file.
        specs: Dtype and shape of each tensor.
        files: The file of each tensor.
        starts: Where the tensors of each file begin, in bytes.
    """

    path: Path
    specs: Mapping[str, Spec]
    files: Mapping[str, Path]
    starts: Mapping[Path, int]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or some of its rows, on the CPU.

        Raises:
            KeyError: No such tensor.
            ValueError: The file has changed since its header was read.
        """
        spec, file = self.specs[name], self.files[name]
        shape, begin, size = spec.shape, spec.start, spec.end - spec.start
        if shape and shape[0] and (start, stop) != (0, None):
            stop = shape[0] if stop is None else min(stop, shape[0])
            begin, size = begin + start * (size // shape[0]), (stop - start) * (size // shape[0])
            shape = (stop - start, *shape[1:])
        data = bytearray(size)
        with open(file, "rb") as handle:
            handle.seek(self.starts[file] + begin)
            if handle.readinto(data) != len(data):
                raise ValueError(f"{file}: changed while it was read; start again when it is complete")
        if not data:
            return torch.empty(shape, dtype=spec.dtype)
        return torch.frombuffer(data, dtype=spec.dtype).view(shape)


def open_shards(path: str | os.PathLike[str]) -> Shards:
    """Read and check the headers of a model's files, and no tensor.

    Args:
        path: A safetensors file; or a directory with `model.safetensors.index.json` and its shards, or with safetensors
            files, an adapter's not among them.

    Raises:
        FileNotFoundError: No such directory, no such file, or a shard that is missing; names it.
        ValueError: A file that is damaged or that leads out of the directory, or a tensor that is in two files.

    >>> import tempfile, safetensors.torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "model.safetensors")
    ...     safetensors.torch.save_file({"a": torch.tensor([1.0, 2.0])}, file)
    ...     open_shards(folder).read("a")
    tensor([1., 2.])
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or directory; nothing is downloaded here, fetch it first")
    folder = Folder(root, root) if root.is_dir() else Folder(root.parent, root.parent)
    names = _files_of(folder) if root.is_dir() else [root.name]
    specs: dict[str, Spec] = {}
    files: dict[str, Path] = {}
    starts: dict[Path, int] = {}
    for name in names:
        file = folder.path / name
        with folder.open(name) as handle:
            weights = open_weights(handle, file)
        starts[file] = weights.size - max((spec.end for spec in weights.specs.values()), default=0)
        for key, spec in weights.specs.items():
            if key in specs:
                raise ValueError(f"{file}: {key!r} is in {files[key].name} too; keep the files of one model there")
            specs[key], files[key] = spec, file
    return Shards(root, specs, files, starts)


def _files_of(folder: Folder) -> list[str]:
    """Return the names of a directory's files of tensors.

    Raises:
        FileNotFoundError: None, or a shard of the index that is missing.
        ValueError: An index that is none.
    """
    if not folder.has(INDEX):
        names = sorted(name for name in os.listdir(folder.path) if name.endswith(".safetensors") and name != WEIGHTS)
        if not names:
            raise FileNotFoundError(f"{folder.path}: has no safetensors files of a model; pickles are never read here")
        return names
    with folder.open(INDEX) as handle:
        placed = parse_object(handle.read(), folder.path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(
        isinstance(name, str) and os.sep not in name for name in placed.values()
    ):
        raise ValueError(f"{folder.path / INDEX}: has no weight_map from tensors to files beside it")
    names = sorted(set(placed.values()))
    if missing := [name for name in names if not folder.has(name)]:
        raise FileNotFoundError(f"{folder.path / missing[0]}: is missing, a shard that {INDEX} names")
    return names
