"""Adapters written to files, as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from torchgraft.functional import AdapterModule, Graft, Routed
from torchgraft.functional.extending import Site, Tree, modules_of, unsharded_type, whole

from .._config.base import AdapterConfig
from .._config.errors import PeftWarning
from .._config.keys import PREFIX, SHARED, join, places, replaced_key, to_keys, with_repeated
from .._config.replaced import other_names, saved_buffers
from .._inplace import get_peft_model_state_dict
from .._inplace.states.embeddings import Choice
from .._inplace.states.layouts import config_of, shared_keys, shared_tensors, source_sites
from .._inplace.tensors.gathering import gathered, groups_of, kept, once
from .._inplace.walk import is_wrapped, layers, unwrap
from .._methods.lora.to_plain import plain as to_plain
from .._methods.lora.to_plain import raw
from .disk.config_file import make_folder, to_json
from .disk.folder import as_directory, check_name, write_pair
from .servers.engines import server_of
from .servers.form import as_served
from .stored import check_target


def save_adapter(
    target: nn.Module | Graft,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    params: Tree | None = None,
    plain: bool = False,
    server: str | None = None,
    save_embedding_layers: Choice = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an adapter into a directory, as PEFT's `save_pretrained` does.

    `adapter_config.json` and `adapter_model.safetensors` go into the directory itself for an adapter of the name
    "default", and else into a subdirectory of the adapter's name. Both files are replaced together: a crash at any
    moment leaves the old pair or the new one.

    Where the adapter is sharded (FSDP1, FSDP2), all processes call this: its tensors are gathered, the first process
    writes, and the others return when the files are there. So they do under tensor parallelism for trained tensors of
    the base that are spread (biases, whole modules). Where each process has all of it (DDP, other adapters under tensor
    parallelism), one process calls this.

    Args:
        target: A model with injected adapters, or a graft.
        path: The directory; made if it is not there.
        adapter_name: Name of the adapter; of a graft with named adapters, the one to save.
        params: The graft's parameters: the adapter's tree, or `{name: tree}`.
        plain: Write a LoRA that started as PiSSA, OLoRA, CorDA, LoRA-GA, MiCA or EVA as a plain one, see `to_plain`;
            PEFT's `path_initial_model_for_weight_conversion`.
        server: The engine that is to serve it, `"vllm"`, `"sglang"`, `"lorax"` or `"llama.cpp"`: the files get a form
            that it loads and scales right, scaling factors in `B`. Without embeddings of the base, if these are not
            asked for.
        save_embedding_layers: Whether the base's input and output embeddings are written too, see
            `get_peft_model_state_dict`; a graft never writes them.
        state_dict: The model's state dict, where the tensors are to be taken from there; then each process that calls
            this writes.

    Returns:
        The directory that holds the two files.

    Raises:
        ValueError: A name that the target does not have or that leads out of the directory; tensors without values.
        KeyError, TypeError: Parameters that do not fit the graft, or embeddings of the base asked of one.
        UnsupportedConfig: What the engine cannot have, each with what to do.
        OSError: Files that cannot be written; names the file.

    >>> import tempfile
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(sorted(file.name for file in save_adapter(graft, folder, params=graft.init()).iterdir()))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    _check_arguments(target, path, adapter_name)
    fields, weights, groups = as_bytes(target, adapter_name, params, plain, save_embedding_layers, state_dict, server)
    root = Path(path)
    folder = root if adapter_name == "default" else root / adapter_name
    once(groups, lambda: write_pair(make_folder(path, adapter_name), fields, weights), folder)
    return folder


def as_bytes(
    target: nn.Module | Graft,
    adapter_name: str = "default",
    params: Tree | None = None,
    plain: bool = False,
    save_embedding_layers: Choice = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    server: str | None = None,
) -> tuple[bytes, bytes, Any]:
    """Return the bytes of an adapter's two files, and the processes that have parts of it, as `save_adapter` does."""
    rules = None if server is None else server_of(server)
    if rules is not None and save_embedding_layers == "auto":
        save_embedding_layers = False
    if isinstance(target, Graft):
        if save_embedding_layers is True or state_dict is not None:
            raise TypeError("save_embedding_layers and state_dict go with a model; of a graft, params are written")
        model, config, sites, state = _of_graft(target, adapter_name, params, plain)
    else:
        model, config, sites, state = _of_model(target, adapter_name, params, plain, save_embedding_layers, state_dict)
    groups = [] if state_dict is not None else groups_of(target, state.values())
    state = {key: _snapshot(key, tensor) for key, tensor in state.items()}
    if rules is not None:
        config, state = as_served(rules, config, model, sites, state)
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    return to_json(_fields(config, model, sites)), weights, groups


def _check_arguments(target: Any, path: Any, adapter_name: Any) -> None:
    if isinstance(path, Mapping) or isinstance(adapter_name, Mapping):
        raise TypeError("the parameters go by name: save_adapter(graft, path, params=params)")
    if isinstance(target, AdapterModule):
        raise TypeError("target is an AdapterModule, expected its graft: save_adapter(m.graft, path, params=m.params)")
    check_target(target, path, "save_adapter(model, path)")
    check_name(adapter_name)
    as_directory(path)


_Saved = tuple[nn.Module, AdapterConfig, Mapping[str, Site], dict[str, Tensor]]


def _of_graft(graft: Graft, adapter_name: str, params: Tree | None, plain: bool) -> _Saved:
    """Return a graft's model, and one adapter's config, sites and tensors."""
    name = adapter_name if graft.binding.named else ""
    if params is None:
        raise TypeError("params is None, expected the graft's parameter tree: save_adapter(graft, path, params=params)")
    if name not in graft.configs:
        raise ValueError(
            f"adapter_name is {name!r}; this graft was bound with {sorted(graft.configs)}, each of which is saved by "
            f"its name: save_adapter(graft, path, {next(iter(graft.configs))!r}, params=params)"
        )
    tree = _own_tree(graft, name, params)
    config, tree = _formed(graft.configs[name], graft.sites[name], tree, plain)
    tree = with_repeated(config, tree, graft.sites[name])
    fixed = {path: config.form.fixed_tensors(config, site) for path, site in graft.sites[name].items()}
    whole_tree = {path: tree.get(path, {}) | fixed.get(path, {}) for path in fixed | tree}
    state = config.form.pack(config, to_keys(config, whole_tree, PREFIX, places(graft.sites[name])))
    modules = modules_of(graft.model)
    state |= {f"{PREFIX}{name}": tensor for name, tensor in saved_buffers(config, modules).items()}
    for other, (at, leaf) in other_names(graft.binding.replaced[name]).items():
        owner = other.rpartition(".")[0]
        if modules[owner] is not modules[at]:
            state[PREFIX + replaced_key(owner, other.rpartition(".")[2], owner in graft.sites[name])] = tree[at][leaf]
    for at, follow in graft.binding.tied[name].items():
        turned = follow.turned(tree[follow.source])
        state |= {join(config, at, leaf, PREFIX): tensor for leaf, tensor in turned.items()}
    if config.form.saves_shared(config):
        shared = config.form.shared_tensors(graft.sites[name].values())
        state |= {f"{SHARED}{one}": tensor for one, tensor in shared.items()}
    return graft.model, config, graft.sites[name], state


def _own_tree(graft: Graft, name: str, params: Any) -> Tree:
    """Return the tree of one of a graft's adapters, which it fits; `{name: tree}` may be given in its place."""
    if isinstance(params, Routed):
        raise TypeError("params is a routed stack, expected the tree of one adapter, unstack(many)[i]")
    tree: Any = params
    if graft.binding.named and isinstance(params, Mapping):
        own = params.get(name)
        if isinstance(own, Mapping) and any(isinstance(leaves, Mapping) for leaves in own.values()):
            tree = own
    graft.binding.active({name: tree} if graft.binding.named else tree)
    result: Tree = tree
    return result


def _of_model(
    target: nn.Module,
    adapter_name: str,
    params: Tree | None,
    plain: bool,
    embeddings: Choice,
    state_dict: Mapping[str, Tensor] | None,
) -> _Saved:
    """Return a model, and one of its adapters' config, sites and tensors."""
    if params is not None:
        raise TypeError(
            "params go with a graft; a model's parameters are those injected in it. For a tree: "
            "save_adapter(bind(model, config), path, params=params)"
        )
    if plain and state_dict is not None:
        raise TypeError("plain and state_dict are both given, and a plain LoRA is made of the model's own tensors")
    given = get_peft_model_state_dict(target, state_dict, adapter_name, save_embedding_layers=embeddings)
    model, prefix = unwrap(target), PREFIX if is_wrapped(target) else ""
    state = {key.removeprefix(prefix): tensor for key, tensor in given.items()}
    config = config_of(model, adapter_name)
    shared = {*shared_tensors(model, config, adapter_name), *shared_keys(model, adapter_name)}
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
        _warn_of_parts(config, sites, state, adapter_name)
        config = raw(config, source_sites(model, adapter_name))
    return model, config, sites, {key if key in shared else f"{PREFIX}{key}": t for key, t in state.items()}


def _warn_of_parts(config: Any, sites: Mapping[str, Site], state: Mapping[str, Tensor], adapter_name: str) -> None:
    """Name tensors of another shape than the adapter's, as parts of sharded ones are; they are written all the same."""
    tree = {
        path: {leaf: torch.empty(shape, device="meta") for leaf, shape in config.method.shapes(config, site).items()}
        for path, site in sites.items()
    }
    expected = to_keys(config, tree, at=places(sites))
    wrong = {key: tuple(state[key].shape) for key, one in expected.items() if key in state}
    wrong = {key: shape for key, shape in wrong.items() if shape != tuple(expected[key].shape)}
    if wrong:
        key, shape = next(iter(wrong.items()))
        warnings.warn(
            f"adapter {adapter_name!r}: {key!r} has shape {shape}, expected {tuple(expected[key].shape)}"
            f" ({len(wrong)} in all), so the file cannot be loaded; if DeepSpeed or FSDP have sharded the parameters, "
            "gather them first, or pass the gathered state_dict",
            PeftWarning,
            stacklevel=4,
        )


def _formed(config: Any, sites: Mapping[str, Site], tree: Tree, plain: bool) -> tuple[Any, Tree]:
    return to_plain(config, sites, tree) if plain else (raw(config, sites), tree)


def _snapshot(key: str, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's values, in memory of its own."""
    if tensor.is_meta:
        raise ValueError(f"{key!r} is on the meta device, so it has no values to save; load or initialise it first")
    result: Tensor = whole(tensor.detach()).to("cpu", copy=True).contiguous()
    return result


def _fields(config: AdapterConfig, model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Any]:
    """Return the fields of the file, with what PEFT fills in."""
    fields = config.to_dict()
    fields["inference_mode"] = True
    name = vars(model).get("name_or_path")
    if fields["base_model_name_or_path"] is None and isinstance(name, str) and name:
        fields["base_model_name_or_path"] = name
    if fields["task_type"] is None:
        fields["auto_mapping"] = {
            "base_model_class": unsharded_type(model).__name__,
            "parent_library": unsharded_type(model).__module__,
        }
    if "fan_in_fan_out" in fields:
        fields["fan_in_fan_out"] |= any(site.kind == "linear" and site.transposed for site in sites.values())
    return fields
