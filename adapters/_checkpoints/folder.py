"""The folder of a model: safetensors in one file or in shards, of which parts of tensors are read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchgraft.functional.extending import did_you_mean

from .._files.disk.headers import Spec, Weights, open_weights
from .._files.disk.strict_json import parse_object

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
"""Ends of files that hold weights, which are not copied beside merged ones."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model's opened files.

    Attributes:
        path: The folder.
        shards: Its weights, by the name of the file.
        shard_of: The file that has a tensor, by the tensor's name.
    """

    path: Path
    shards: Mapping[str, Weights]
    shard_of: Mapping[str, str]

    def spec(self, name: str) -> Spec:
        """Return what the header says of a tensor.

        Raises:
            KeyError: No such tensor; names the nearest.
        """
        if name not in self.shard_of:
            raise KeyError(f"{self.path}: has no tensor {name!r}{did_you_mean(name, self.shard_of)}")
        return self.shards[self.shard_of[name]].specs[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a tensor, `"stop-start ..."`, on the CPU; by default all."""
        spec, weights = self.spec(name), self.shards[self.shard_of[name]]
        if not spec.shape:
            return read_span(weights.handle, data_start(weights) + spec.start, (), spec.dtype)
        stop = spec.shape[0] if stop is None else min(stop, spec.shape[0])
        row = (spec.end - spec.start) // max(spec.shape[0], 1)
        return read_span(
            weights.handle, data_start(weights) + spec.start + start * row, (stop - start, *spec.shape[1:]), spec.dtype
        )

    def config(self) -> dict[str, Any]:
        """Return the fields of `config.json`, none where there is no such file."""
        file = self.path / "config.json"
        return parse_object(file.read_bytes(), file) if file.exists() else {}

    def others(self) -> list[Path]:
        """Return the files beside the weights: config, tokenizer, index and the like."""
        files = (file for file in sorted(self.path.iterdir()) if file.is_file())
        return [file for file in files if file.suffix not in WEIGHTS and not file.name.startswith(".")]


def read_span(handle: BinaryIO, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a tensor of this shape from a place in a file.

    Raises:
        ValueError: A file that ends before.
    """
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(count * dtype.itemsize)
    handle.seek(at)
    if handle.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ValueError(f"{handle.name}: became shorter while it was read; start again when nobody writes to it")
    return torch.frombuffer(data, dtype=dtype).view(shape)


def data_start(weights: Weights) -> int:
    """Return where the tensors of a file begin."""
    return weights.size - max((spec.end for spec in weights.specs.values()), default=0)


@contextlib.contextmanager
def open_model(path: str | os.PathLike[str]) -> Iterator[ModelFolder]:
    """Open the safetensors of a model's folder: those that its index names, else all that are there.

    Raises:
        FileNotFoundError: No such folder, none of its files, or a shard that the index names; says what is there.
        ValueError: Files that are damaged, or two that have one tensor.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; nothing is downloaded here, fetch the model first")
    with contextlib.ExitStack() as stack:
        shards, shard_of = {}, dict[str, str]()
        for name in _shard_names(folder):
            handle = stack.enter_context(open(folder / name, "rb"))
            shards[name] = open_weights(handle, folder / name)
            for tensor in shards[name].specs:
                if tensor in shard_of:
                    raise ValueError(
                        f"{folder}: {shard_of[tensor]} and {name} both have {tensor!r}; remove one of them"
                    )
                shard_of[tensor] = name
        yield ModelFolder(folder, shards, shard_of)


def _shard_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = parse_object(index.read_bytes(), index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(one, str) and "/" not in one for one in named.values()):
            raise ValueError(f"{index}: weight_map is {str(named)[:80]}, expected an object of file names")
        names = sorted(set(named.values()))
        if missing := [name for name in names if not (folder / name).exists()]:
            raise FileNotFoundError(f"{folder}: lacks {missing[0]}, which its index names; fetch all of the model")
        return names
    names = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if not names:
        there = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHTS)
        what = f"; there is {there[0]}, which is not read here: save the model as safetensors first" if there else ""
        raise FileNotFoundError(f"{folder}: has no safetensors of a model{what}")
    return names
