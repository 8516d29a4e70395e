"""Injection: adapters in the user's own model, as PEFT's low-level API puts them there."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import trees
from torchgraft.functional.method import Entry, Tree
from torchgraft.functional.plan import plan_sites
from torchgraft.functional.site import Site

from ..config import AdapterConfig
from ..keys import names_of, split_key
from ..targets import exact, find_targets
from .layer import BaseTunerLayer
from .modules_to_save import wrap_modules
from .switch import adapter_names, parts
from .walk import bare_modules, layers, unwrap


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    params: Tree | None = None,
) -> nn.Module:
    """Put an adapter into a model, in place, and make it the active and trainable one.

    PEFT's `inject_adapter_in_model`: the same modules, names, initial numbers and frozen tensors. Either everything
    happens or, on an error, nothing. Targeted modules are replaced by layers that hold them as `base_layer`; all else
    about the model stays: its class, its methods, its modes.

    What is different from PEFT: a layer is in evaluation mode where its module is; a module under two names is adapted
    under both; a name that is taken is an error; methods with shared tensors (VeRA) work too.

    Args:
        peft_config: The adapter's config. It is copied, into `model.peft_config[adapter_name]`.
        model: The model; changed in place.
        adapter_name: Name of the adapter, without dots.
        low_cpu_mem_usage: Make the parameters on the meta device, for `set_peft_model_state_dict(...,
            low_cpu_mem_usage=True)`.
        state_dict: Keys of an adapter: the modules and ranks are taken from there, not from the config. The values are
            not loaded.
        params: A tree as `bind(model, peft_config).init()` makes it, whose tensors become the parameters, sharing their
            memory.

    Returns:
        `model`.

    Raises:
        TypeError: No module, no config.
        ValueError: A name that is taken or unfit, a config that matches nothing or a module that its method does not
            support, a `state_dict` that does not fit the model.
        KeyError: `params` that do not fit.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    model = unwrap(model)
    _check(peft_config, model, adapter_name, state_dict, params)
    config, modules = copy.deepcopy(peft_config), bare_modules(model)
    if state_dict is None:
        paths = find_targets(config, modules, model)
    else:
        config, paths = _from_keys(config, state_dict, modules, model)
    if "" in paths:
        raise ValueError(f"{type(config).__name__}: the model itself is targeted, which cannot be replaced in place")
    sites = plan_sites(config, modules, paths)
    leaves = _leaves(config, sites, modules, low_cpu_mem_usage, params)
    places = _places(model, sites, modules)
    wraps = wrap_modules(config, model, adapter_name, modules)

    first = not adapter_names(model)
    for path, site in sites.items():
        layer, parents = places[path]
        layer.add(adapter_name, Entry(config, site), leaves[path])
        for parent, name in parents:
            parent._modules[name] = layer
    for wrap in wraps:
        wrap()
    if not hasattr(model, "peft_config"):
        vars(model)["peft_config"] = {}
    configs: Any = model.peft_config
    configs[adapter_name] = config
    if first:
        model.requires_grad_(False)
    # As set_adapter, but the other adapters stay as they are, so that it takes no longer with many of them.
    for part in parts(model):
        if isinstance(part, BaseTunerLayer):
            part.unmerge()
        part.activate(adapter_name)
        part.set_requires_grad(adapter_name, not config.inference_mode)
    return model


def _check(config: Any, model: nn.Module, name: Any, state_dict: Any, params: Any) -> None:
    if isinstance(config, type) or not isinstance(config, AdapterConfig):
        given = f"the class {config.__name__}" if isinstance(config, type) else f"of type {type(config).__name__}"
        raise TypeError(f"peft_config is {given}, expected a config object such as LoraConfig(target_modules=[...])")
    if not isinstance(name, str) or not re.fullmatch(r"[^.\s/\\]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name is {name!r}, expected a name without dots, slashes and spaces that is no attribute of "
            "nn.ModuleDict"
        )
    taken = adapter_names(model)
    if name in taken:
        raise ValueError(
            f"the model has an adapter {name!r} already (it has {taken}); choose another adapter_name, or call "
            "delete_adapter first"
        )
    if state_dict is not None and params is not None:
        raise ValueError("state_dict and params are both given, expected one: keys to infer targets from, or a tree")


def _from_keys(
    config: AdapterConfig, state_dict: Mapping[str, Tensor], modules: Mapping[str, nn.Module], model: nn.Module
) -> tuple[AdapterConfig, list[str]]:
    """The config that fits these keys, and the modules they name in the model's order."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if (split := split_key(config, key)) is not None:
            found.setdefault(split[0], {})[split[1]] = tensor
    if not found:
        leaves = [*config.form.modules, *config.form.parameters]
        raise ValueError(f"state_dict has no key of {config.method.name}, expected keys like '<module>.{leaves[0]}'")
    unknown = sorted(path for path in found if path not in modules)
    if unknown:
        raise ValueError(f"state_dict names modules that the model does not have: {names_of(unknown)}")
    paths = [path for path in modules if path in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            named = set(find_targets(config, modules, model))
        except ValueError:
            named = set()
    if named and named != set(paths):
        warnings.warn(
            f"{type(config).__name__} and state_dict name different modules; state_dict counts. Only the config has "
            f"{sorted(named - set(paths))[:6]}, only state_dict has {sorted(set(paths) - named)[:6]}",
            RuntimeWarning,
            stacklevel=3,
        )
    config = exact(config, paths, modules)
    return dataclasses.replace(config, **(config.form.infer(config, found) if config.form.infer else {})), paths


def _leaves(
    config: AdapterConfig,
    sites: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    meta: bool,
    params: Tree | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each site: planted, empty, or drawn and cast to what the base has."""
    shapes = {path: config.method.shapes(config, site) for path, site in sites.items()}
    if params is not None:
        trees.check(params, shapes)
        return {path: {leaf: nn.Parameter(t.detach()) for leaf, t in params[path].items()} for path in sites}
    if meta:
        with torch.device("meta"):
            drawn = {path: {leaf: torch.empty(shape) for leaf, shape in shapes[path].items()} for path in sites}
    else:
        drawn = config.method.init(config, list(sites.values()), None)
    made = {}
    for path in sites:
        weight: Any = modules[path].weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        device = "meta" if meta else weight.device
        made[path] = {leaf: nn.Parameter(tensor.to(device, dtype)) for leaf, tensor in drawn[path].items()}
    return made


def _places(
    model: nn.Module, sites: Mapping[str, Site], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[BaseTunerLayer, list[tuple[nn.Module, str]]]]:
    """For each site its layer, a new one or the one that is there, and where a new one has to hang."""
    present = {id(layer.base_layer): layer for layer in layers(model).values()}
    new = {id(modules[path]): path for path in sites if id(modules[path]) not in present}
    parents: dict[int, list[tuple[nn.Module, str]]] = {key: [] for key in new}
    for module in set(modules.values()):
        for name, child in module._modules.items():
            if id(child) in new:
                parents[id(child)].append((module, name))
        _check_plain(module, new)
    places = {}
    for path in sites:
        module = modules[path]
        where = parents.get(id(module), [])
        layer = present.get(id(module)) or BaseTunerLayer(module, where[0][0] if where else None)
        places[path] = (layer, where)
    return places


def _check_plain(module: nn.Module, targeted: Mapping[int, str]) -> None:
    """Refuse a target that is also kept where no replacement reaches it."""
    for attribute, value in vars(module).items():
        if attribute in ("_modules", "_parameters", "_buffers"):
            continue
        held = value.values() if isinstance(value, dict) else value
        items = list(held) if isinstance(value, (dict, list, tuple, set)) else [value]
        for item in items:
            owner = getattr(item, "__self__", item)
            if id(owner) in targeted:
                raise ValueError(
                    f"{targeted[id(owner)]}: {type(module).__name__}.{attribute} keeps this module too, outside of the "
                    "module tree, and would go on with the one without adapter; keep it in a submodule or a "
                    "ModuleList, leave it out of target_modules, or use bind(model, config), which follows it"
                )
