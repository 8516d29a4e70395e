"""The folder of a model: its tensors, and the files beside them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchgraft.functional.extending import did_you_mean

from .._files.disk.headers import Spec
from .._files.disk.shards import open_shards
from .._files.disk.strict_json import parse_object
from .stacked import StackedShards, with_stacked

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
"""Ends of files that hold weights, which are not copied beside merged ones."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model's files.

    Attributes:
        path: The folder.
        tensors: Its tensors, and parameters that stack experts which the files keep apart.
    """

    path: Path
    tensors: StackedShards

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self.tensors.specs

    def spec(self, name: str) -> Spec:
        """Return what the header says of a tensor.

        Raises:
            KeyError: No such tensor; names the nearest.
        """
        if name not in self:
            raise KeyError(f"{self.path}: has no tensor {name!r}{did_you_mean(name, self.tensors.specs)}")
        return self.tensors.specs[name]

    def shards(self) -> dict[Path, dict[str, Spec]]:
        """Return what each file of tensors has."""
        found: dict[Path, dict[str, Spec]] = {file: {} for file in self.tensors.starts}
        for name, file in self.tensors.files.items():
            found[file][name] = self.tensors.specs[name]
        return found

    def config(self) -> Mapping[str, Any]:
        """Return the fields of `config.json`, none where there is no such file."""
        file = self.path / "config.json"
        return parse_object(file.read_bytes(), file) if file.exists() else {}

    def others(self) -> list[Path]:
        """Return the files beside the weights: config, tokenizer, index and the like."""
        files = (file for file in sorted(self.path.iterdir()) if file.is_file())
        return [file for file in files if file.suffix not in WEIGHTS and not file.name.startswith(".")]


def model_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Return a model's folder, its headers read and checked.

    Raises:
        NotADirectoryError: A file.
        FileNotFoundError, ValueError: Files that are missing or damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: is a file, expected the directory of a model: {str(folder.parent)!r}")
    return ModelFolder(folder, with_stacked(open_shards(folder)))
