"""Adapters in files, as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from torchgraft.functional import Graft
from torchgraft.functional.extending import Site, Tree, modules_of, whole

from ..config.base import AdapterConfig
from ..config.keys import PREFIX, SHARED, join, places, replaced_key, to_keys
from ..config.replaced import other_names, saved_buffers
from ..inplace import get_peft_model_state_dict
from ..inplace.gathering import check_averaged, gathered, groups_of, kept, once
from ..inplace.state import config_of, shared_tensors, source_sites
from ..inplace.walk import layers, unwrap
from ..methods.lora.to_plain import plain as to_plain
from ..methods.lora.to_plain import raw
from .disk.folder import WEIGHTS, Folder, check_name, find_folder, open_pair, read_config, write_config, write_pair
from .disk.headers import open_weights
from .disk.strict_json import parse_object
from .loading import Stored, load_into_graft, load_into_model


def save_adapter(
    target: nn.Module | Graft,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    params: Tree | None = None,
    plain: bool = False,
) -> Path:
    """Write an adapter into a directory, as PEFT's `save_pretrained` does.

    `adapter_config.json` and `adapter_model.safetensors` go into the directory itself for an adapter of the name
    "default", and else into a subdirectory of the adapter's name. Both files are replaced together: a crash at any
    moment leaves the old pair or the new one.

    Where the adapter is sharded (FSDP1, FSDP2), all processes call this: its tensors are gathered, the first process
    writes, and the others return when the files are there. Where each process has all of it (DDP, tensor parallelism),
    one process calls this.

    Args:
        target: A model with injected adapters, or a graft.
        path: The directory; made if it is not there.
        adapter_name: Name of the adapter; of a graft with named adapters, the one to save.
        params: The graft's parameters: the adapter's tree, or `{name: tree}`.
        plain: Write a LoRA that started as PiSSA, OLoRA, CorDA, LoRA-GA, MiCA or EVA as a plain one, see `to_plain`;
            PEFT's `path_initial_model_for_weight_conversion`.

    Returns:
        The directory that holds the two files.

    Raises:
        ValueError: A name that the target does not have or that leads out of the directory; tensors without values.
        KeyError, TypeError: Parameters that do not fit the graft.
        OSError: Files that cannot be written; names the file.

    >>> import tempfile
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(sorted(file.name for file in save_adapter(graft, folder, params=graft.init()).iterdir()))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_name(adapter_name)
    if isinstance(target, Graft):
        model, config, sites, state = _of_graft(target, adapter_name, params, plain)
    else:
        model, config, sites, state = _of_model(target, adapter_name, params, plain)
    groups = groups_of(target, state.values())
    weights = safetensors.torch.save(
        {key: _snapshot(key, tensor) for key, tensor in state.items()}, metadata={"format": "pt"}
    )
    fields = _to_json(_fields(config, model, sites))
    root = Path(path)
    folder = root if adapter_name == "default" else root / adapter_name
    once(groups, lambda: write_pair(_made(path, adapter_name), fields, weights), folder)
    return folder


def load_adapter(
    target: nn.Module | Graft,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    check_finite: bool = False,
    is_trainable: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Read an adapter from a directory that `save_adapter` or PEFT wrote.

    A model gets the adapter injected, as its active one. For a graft, which has a config already, the files give the
    parameters, and their config has to mean the same as the graft's.

    Only JSON and safetensors are read, never a pickle, and nothing is downloaded. Config, keys, shapes and dtypes are
    held against the model before any tensor is read; on any error the model is what it was. Several threads can load
    into several models at once. Of a model that is sharded, all processes take part, and each reads the files.

    Args:
        target: A model, or a graft.
        path: The directory. If it has a subdirectory of the adapter's name with an adapter in it, that is read.
        adapter_name: Name for the adapter, which may have been saved under another one; of a graft with named adapters,
            the one to load.
        check_finite: Refuse NaN and infinite values.
        is_trainable: Whether the injected adapter is to be trained; of no effect for a graft.
        dtype: Dtype of the parameters. By default that of the base in a model, as `inject_adapter_in_model` has it; for
            a graft float32, or the base's where that is wider, as `Graft.init` has it.
        device: Device of the parameters; by default each site's own.

    Returns:
        The model, or the adapter's tree for the graft.

    Raises:
        FileNotFoundError: No such directory or file.
        ValueError: Files that are damaged, that contradict each other, the model or the graft, or that lead out of the
            directory; a name that is taken.
        KeyError: Tensors that are missing, or that nothing has a use for.
        TypeError: A target that is neither a model nor a graft.

    >>> import tempfile
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> graft = bind(model, LoraConfig(target_modules=["0"]))
    >>> params = graft.init()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_adapter(graft, folder, params=params)
    ...     loaded = load_adapter(graft, folder)
    ...     model = load_adapter(model, folder)
    >>> torch.equal(loaded["0"]["lora_A"], params["0"]["lora_A"]), model[0].active_adapters
    (True, ['default'])
    """
    model = target if isinstance(target, Graft) else unwrap(target)
    with open_pair(find_folder(path, adapter_name)) as (config_file, data, handle):
        config = _to_config(config_file, data)
        weights_file = config_file.parent / WEIGHTS
        with about(weights_file):
            stored = Stored(config, open_weights(handle, weights_file), check_finite, dtype, device)
        with about(config_file), gathered(target, writes=True):
            if isinstance(model, Graft):
                return load_into_graft(model, stored, adapter_name)
            check_averaged(target, is_trainable)
            load_into_model(model, stored, adapter_name, is_trainable)
            return target


def save_config(config: AdapterConfig, path: str | os.PathLike[str]) -> None:
    """Write `adapter_config.json` into a directory; the file is replaced as a whole or not at all.

    Raises:
        OSError: A file that cannot be written.

    >>> import tempfile
    >>> from torchgraft.adapters import IA3Config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_config(IA3Config(target_modules=["k"]), folder)
    ...     load_config(folder).target_modules
    ['k']
    """
    write_config(_made(path, "default"), _to_json(config.to_dict()))


def load_config(path: str | os.PathLike[str], subfolder: str | None = None) -> AdapterConfig:
    """Read `adapter_config.json` from a directory.

    Args:
        path: The directory.
        subfolder: A directory within it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no config, or that leads out of the directory; names the file and the field.
    """
    root = Path(path)
    folder = Folder(root, root / subfolder if subfolder else root)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path}: no such directory; nothing is downloaded here, fetch it first")
    with contextlib.ExitStack() as stack:
        weights = None
        with contextlib.suppress(FileNotFoundError):
            weights = stack.enter_context(folder.open(WEIGHTS))
        file, data = read_config(folder, weights)
    return _to_config(file, data)


def _to_config(file: Path, data: bytes) -> AdapterConfig:
    fields = parse_object(data, file)
    if "peft_type" not in fields:
        raise ValueError(f"{file}: has no peft_type, expected the config of an adapter, such as LORA")
    with about(file):
        return AdapterConfig.from_dict(fields)


def _to_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def _made(path: str | os.PathLike[str], adapter_name: str) -> Path:
    """The directory for an adapter, made if it is not there."""
    root = Path(path)
    folder = root if adapter_name == "default" else root / adapter_name
    for one in (root, folder):
        if one.exists() and not one.is_dir():
            raise NotADirectoryError(f"{one}: is a file, expected a directory")
    os.makedirs(root, exist_ok=True)
    Folder(root, folder)
    os.makedirs(folder, exist_ok=True)
    return folder


_Saved = tuple[nn.Module, AdapterConfig, Mapping[str, Site], dict[str, Tensor]]


def _of_graft(graft: Graft, adapter_name: str, params: Tree | None, plain: bool) -> _Saved:
    """A graft's model, and one adapter's config, sites and tensors."""
    name = adapter_name if graft.named else ""
    if params is None:
        raise TypeError("params is None, expected the graft's parameter tree: save_adapter(graft, path, params=params)")
    if name not in graft.configs:
        raise ValueError(f"adapter_name is {name!r}; this graft was bound with {sorted(graft.configs)}")
    own = params.get(name)
    by_name = graft.named and isinstance(own, Mapping) and any(isinstance(leaves, Mapping) for leaves in own.values())
    tree = params[name] if by_name else params
    graft.active({name: tree} if graft.named else tree)
    config, tree = _formed(graft.configs[name], graft.sites[name], tree, plain)
    fixed = {path: config.form.fixed_tensors(config, site) for path, site in graft.sites[name].items()}
    state = to_keys(
        config, {path: leaves | fixed.get(path, {}) for path, leaves in tree.items()}, PREFIX, places(graft.sites[name])
    )
    modules = modules_of(graft.model)
    state |= {f"{PREFIX}{name}": tensor for name, tensor in saved_buffers(config, modules).items()}
    for other, (at, leaf) in other_names(graft.replaced[name]).items():
        owner = other.rpartition(".")[0]
        if modules[owner] is not modules[at]:
            state[PREFIX + replaced_key(owner, other.rpartition(".")[2], owner in graft.sites[name])] = tree[at][leaf]
    for at, follow in graft.follows[name].items():
        turned = follow.turned(tree[follow.source])
        state |= {join(config, at, leaf, PREFIX): tensor for leaf, tensor in turned.items()}
    if config.form.saves_shared(config):
        constants = next(iter(graft.sites[name].values())).constants
        state |= {f"{SHARED}{shared}": constants[shared] for shared in config.form.shared}
    return graft.model, config, graft.sites[name], state


def _of_model(target: nn.Module, adapter_name: str, params: Tree | None, plain: bool) -> _Saved:
    """A model, and one of its adapters' config, sites and tensors."""
    if params is not None:
        raise TypeError("params go with a graft; a model's parameters are those injected in it")
    state = get_peft_model_state_dict(target, adapter_name=adapter_name)
    model = unwrap(target)
    config = config_of(model, adapter_name)
    shared = shared_tensors(model, config, adapter_name)
    sites = {
        path: layer.entries[adapter_name].site for path, layer in layers(model).items() if adapter_name in layer.entries
    }
    if plain:
        with gathered(target):
            found = layers(model).items()
            leaves = {
                path: {leaf: kept(one) for leaf, one in layer.numbers(adapter_name).items()}
                for path, layer in found
                if path in sites
            }
        config, tree = to_plain(config, source_sites(model, adapter_name), leaves)
        state |= to_keys(config, tree, at=places(sites))
    else:
        config = raw(config, source_sites(model, adapter_name))
    return model, config, sites, {key if key in shared else f"{PREFIX}{key}": t for key, t in state.items()}


def _formed(config: Any, sites: Mapping[str, Site], tree: Tree, plain: bool) -> tuple[Any, Tree]:
    return to_plain(config, sites, tree) if plain else (raw(config, sites), tree)


def _snapshot(key: str, tensor: Tensor) -> Tensor:
    """A copy of a tensor's values, in memory of its own."""
    if tensor.is_meta:
        raise ValueError(f"{key!r} is on the meta device, so it has no values to save; load or initialise it first")
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def _fields(config: AdapterConfig, model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Any]:
    """The fields of the file, with what PEFT fills in."""
    fields = config.to_dict()
    fields["inference_mode"] = True
    name = vars(model).get("name_or_path")
    if fields["base_model_name_or_path"] is None and isinstance(name, str) and name:
        fields["base_model_name_or_path"] = name
    if fields["task_type"] is None:
        fields["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    if "fan_in_fan_out" in fields:
        fields["fan_in_fan_out"] |= any(site.kind == "linear" and site.transposed for site in sites.values())
    return fields


@contextlib.contextmanager
def about(file: Path) -> Iterator[None]:
    """Have errors name the file."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if text.startswith((str(file), str(file.parent / WEIGHTS))):
            raise
        kind = next((one for one in (KeyError, RuntimeError, TypeError) if isinstance(error, one)), ValueError)
        raise kind(f"{file}: {text}") from error
