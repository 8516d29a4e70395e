"""Adapters read from a directory into memory, and written into a new one, without a model."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import SHARED, Tree

from .._arithmetic.products import Adapter
from .._config.base import AdapterConfig
from .._config.keys import PREFIX, from_keys, to_keys
from .._config.messages import names_of
from .._conversion.formats import Formatted, from_format
from .._files.disk.config_file import about, make_folder, parse_fields, to_json
from .._files.disk.folder import CONFIG, WEIGHTS, find_folder, open_pair, sync, temporary, write_pair
from .._files.disk.headers import open_weights
from .._files.disk.shards import open_shards
from .._files.packed import unpacked


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's config and tree.

    Raises:
        FileNotFoundError, ValueError: No such files, or damaged ones.
        UnsupportedConfig: Tensors that mean something on a model only: stacked experts, modules trained as a whole.
    """
    with open_pair(find_folder(path, "default")) as (config_file, data, handle):
        file = config_file.parent / WEIGHTS
        with about(config_file):
            config = AdapterConfig.from_dict(parse_fields(config_file, data))
        with about(file):
            tensors = unpacked(config, open_weights(handle, file)).read()
    tree, rest = from_keys(config, tensors)
    if rest or getattr(config, "target_parameters", None):
        what = names_of(rest) if rest else f"the factors of {config.target_parameters}"  # type: ignore[attr-defined]
        raise UnsupportedConfig(
            f"{file}: has {what}, beside factors of modules, which mean something on a model only; load it there, "
            "load_adapter(graft, path), and use the function of the same name"
        )
    return config, tree


def read_any(path: str | os.PathLike[str], prefix: str | None = None, model: str | None = None) -> Adapter:
    """Read an adapter of PEFT's or another program's form: a directory, or a safetensors file.

    Args:
        path: The directory or the file.
        prefix: The part of a pipeline to take.
        model: The directory of the model, for names of modules that a file's keys do not tell.

    Raises:
        FileNotFoundError, ValueError: No such files, or damaged ones; keys of no form.
    """
    file = Path(path)
    if file.is_dir() and (file / CONFIG).exists():
        return read_adapter(path)
    with about(file):
        shards = open_shards(file)
        tensors = {name: shards.read(name) for name in shards.specs}
        return from_format(tensors, prefix=prefix, modules=module_names(model))


def module_names(model: str | None) -> list[str] | None:
    """Return the names of the modules that have tensors in a model's files.

    Raises:
        FileNotFoundError, ValueError: No such files, or damaged ones.
    """
    return None if model is None else sorted({name.rpartition(".")[0] for name in open_shards(model).specs})


def write_form(path: str | os.PathLike[str], made: Formatted) -> Path:
    """Write an adapter in another program's form: a safetensors file, or a directory where a config goes with it.

    Raises:
        OSError: A path that is there already, or that cannot be written.
    """
    out = new_folder(path)
    data = {key: tensor.detach().contiguous() for key, tensor in made.tensors.items()}
    weights = safetensors.torch.save(data, metadata={"format": "pt"})
    if made.fields:
        write_pair(make_folder(out), to_json(made.fields), weights)
        return out
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: this form is one file; give a name that ends in .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary(out.parent, out.name, weights) as ready:
        os.replace(ready, out)
    sync(out.absolute().parent)
    return out


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Return a path to write to, at which there is nothing yet.

    Raises:
        FileExistsError: There is something.
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is there already; give another path, or delete it first")
    return folder


def write_adapter(path: str | os.PathLike[str], config: AdapterConfig, tree: Tree) -> Path:
    """Write an adapter into a new directory.

    Raises:
        OSError: A directory that is there already, or that cannot be written.
    """
    folder = new_folder(path)
    own = {place: leaves for place, leaves in tree.items() if place != SHARED}
    keys = to_keys(config, own, PREFIX) | to_keys(config, {SHARED: tree[SHARED]} if SHARED in tree else {})
    data = {key: tensor.detach().contiguous() for key, tensor in keys.items()}
    weights = safetensors.torch.save(data, metadata={"format": "pt"})
    write_pair(make_folder(folder), to_json(config.to_dict() | {"inference_mode": True}), weights)
    return folder
