"""Models whose tensors are read one at a time: modules, state dicts, and folders of safetensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchgraft.functional import Site
from torchgraft.functional.extending import given_type, state_of

from .._files.disk.folder import Folder
from .._files.disk.shards import Shards, open_shards
from .._files.disk.strict_json import parse_object

_STORE_IN_OUT = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}
"""Layers of `transformers` that are `Conv1D`, whose weight is `"in out"`, by `model_type`."""

_EMBEDDINGS = ("wte", "wpe", "shared", "tok_embeddings")


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of a model, by name.

    Attributes:
        what: How errors call it.
        names: All names.
        read: `name -> tensor`.
        module: The model, if it is one.
        fields: Fields of `config.json` beside the files.
    """

    what: str
    names: Collection[str]
    read: Callable[[str], Tensor]
    module: nn.Module | None
    fields: Mapping[str, Any]


def source_of(given: Any, what: str) -> Source:
    """Return a model, a state dict or files as tensors by name.

    Raises:
        TypeError: Something else.
        FileNotFoundError, ValueError: Files that are missing or damaged.
    """
    if isinstance(given, nn.Module):
        state = state_of(given)
        return Source(what, state.keys(), state.__getitem__, given, {})
    if isinstance(given, Mapping):
        return Source(what, given.keys(), given.__getitem__, None, {})
    if isinstance(given, (str, os.PathLike)):
        shards = open_shards(given)
        return Source(f"{what}, {given}", shards.specs.keys(), shards.read, None, _fields_beside(shards))
    raise TypeError(f"{what} is {given_type(given)}, expected a module, a state dict, or a path of safetensors files")


def _fields_beside(shards: Shards) -> dict[str, Any]:
    path = shards.path if shards.path.is_dir() else Path(shards.path).parent
    folder = Folder(path, path)
    if not folder.has("config.json"):
        return {}
    with folder.open("config.json") as handle:
        return parse_object(handle.read(), path / "config.json")


def site_by_name(name: str, shape: tuple[int, ...], fields: Mapping[str, Any]) -> Site | None:
    """Tell from a tensor's name and shape alone what layer it is the weight of; `None` for no layer's.

    Two axes are a linear layer's or an embedding's, by the names that `transformers` has for those; three to five are a
    convolution's in one group.

    >>> site_by_name("model.embed_tokens.weight", (100, 8), {}).kind
    'embedding'
    >>> site_by_name("norm.weight", (8,), {}) is None
    True
    """
    path, _, leaf = name.rpartition(".")
    if leaf != "weight" or not 2 <= len(shape) <= 5:
        return None
    last = path.rpartition(".")[2]
    if len(shape) > 2:
        return Site(path, f"conv{len(shape) - 2}d", shape[1], shape[0], kernel_size=shape[2:])
    if last in _EMBEDDINGS or "embed" in last:
        return Site(path, "embedding", shape[0], shape[1], transposed=True)
    flipped = last in _STORE_IN_OUT.get(str(fields.get("model_type")), ())
    inputs, outputs = shape if flipped else shape[::-1]
    return Site(path, "linear", inputs, outputs, transposed=flipped)
