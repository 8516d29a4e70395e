"""Injection: adapters in the user's own model, as PEFT's low-level API puts them there."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Weights, trees
from torchgraft.functional.extending import (
    PARAMETERS,
    Entry,
    Plan,
    Site,
    Tree,
    agreed,
    child_of_wrapper,
    each,
    follower,
    plan_follows,
    plan_replaced,
    plan_sites,
    shapes_of,
    trainable_dtype,
    weights_of,
    with_parts,
)

from ..config.base import AdapterConfig
from ..config.keys import split_key
from ..config.messages import names_of
from ..config.replaced import saved_modules
from ..config.replication import replicating
from ..config.targets import exact, find_targets
from ..config.tokens import LEAF as TOKENS
from . import root
from .biases import ATTRIBUTE, Biases, biases_of
from .gathering import check_averaged, gathered
from .layer import BaseTunerLayer
from .leaves import key_of
from .modules_to_save import ModulesToSaveWrapper
from .overlaps import check_apart, check_names, check_overlap, check_tokens
from .parameters import ParameterLayer
from .restoring import restoring
from .switch import adapter_names, take_out
from .tokens import TrainableTokensWrapper
from .walk import bare_modules, layers, named, original_base, outermost, parts, unwrap


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
    about the model stays: its class, its methods, its modes. Merged adapters are unmerged first. If all adapters are
    disabled, so is the new one.

    What is different from PEFT: a layer is in evaluation mode where its module is; a module under two names is adapted
    under both; a name that is taken is an error; methods with shared tensors (VeRA) work too; a second adapter's copies
    of `modules_to_save` are active and trained like the rest of it; adapters of different methods share a layer, but
    for LoRA and AdaLoRA, whose parameters have the same names.

    Args:
        peft_config: The adapter's config. It is copied, into `model.peft_config[adapter_name]`. Without
            `target_modules`, a model with a known `config.model_type` has PEFT's defaults.
        model: The model; changed in place.
        adapter_name: Name of the adapter, without dots.
        low_cpu_mem_usage: Make the parameters on the meta device, for `set_peft_model_state_dict(...,
            low_cpu_mem_usage=True)`.
        state_dict: Keys of an adapter: the modules and ranks are taken from there, not from the config. The values are
            not loaded.
        params: A tree as `bind(model, peft_config).init()` makes it, whose tensors become the parameters, sharing their
            memory where they have the dtype and the device of what they are in.

    Of a model that is sharded, all processes take part, and what is drawn is what the first one draws.

    Returns:
        `model`.

    Raises:
        TypeError: No module, no config.
        ValueError: A name that is taken or unfit, a config that matches nothing or a module that its method does not
            support, a `state_dict` that does not fit the model; an adapter on what is one of `modules_to_save`;
            one to be trained in a model that several processes train already, whose gradients nobody would average.
        RuntimeError: Something else wrote to the weights while adapters were merged.
        KeyError: `params` that do not fit.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    given, model = model, unwrap(model)
    _check(peft_config, model, adapter_name, state_dict, params)
    check_averaged(given, trained=not peft_config.inference_mode)
    with gathered(given, writes=True), replicating(model, peft_config, adapter_names(model)), restoring(model):
        _inject(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, params)
    root.attach(model)
    return given


def _inject(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str,
    low_cpu_mem_usage: bool,
    state_dict: Mapping[str, Tensor] | None,
    params: Tree | None,
) -> None:
    config, modules = copy.deepcopy(peft_config), bare_modules(model)
    if state_dict is None:
        config = config.for_model(model, modules)
        paths = find_targets(config, modules, model)
    else:
        config, paths = _from_keys(config, state_dict, modules, model)
    for path in paths:
        if not (path if path in modules else path.rpartition(".")[0]):
            what = f"{path}, a parameter of the model itself, is" if path else "the model itself is"
            raise ValueError(f"{type(config).__name__}: {what} targeted, which cannot be replaced in place")
    base = original_base(model)
    sites = plan_sites(config, modules, paths, base)
    _check_biases(model, config)
    replaced = plan_replaced(config, modules, model, sites)
    if params is not None:
        trees.check(params, shapes_of(config, sites, replaced))
    leaves = _leaves(config, sites, modules, weights_of(sites, modules, base), low_cpu_mem_usage, params)
    sites = {path: _started(config, site, leaves[path]) for path, site in sites.items()}
    entries: dict[str, Entry] = {path: Entry(config, site) for path, site in sites.items()}
    for path, follow in plan_follows(config, modules, sites).items():
        entries[path] = follower(config, path, modules[path], follow, sites[follow.source])
        turned = follow.turned({leaf: parameter.detach() for leaf, parameter in leaves[follow.source].items()})
        leaves[path] = {leaf: nn.Parameter(tensor) for leaf, tensor in turned.items()}  # of one memory, as in PEFT
    saved = saved_modules(config, modules)
    followers = _followers(replaced, modules, saved)
    beside = {one.names[0].rpartition(".")[0] for _, leaf, one in each(replaced) if leaf == TOKENS}
    beside |= {path for path, (_, leaf, _) in followers.items() if leaf == TOKENS}
    copied = saved | {path: modules[path] for path, (_, leaf, _) in followers.items() if leaf != TOKENS}
    targets = {path: modules[entry.site.owner] for path, entry in entries.items()}
    owners = [entry.site.owner for entry in entries.values()]
    check_overlap(model, modules, owners, copied)
    check_tokens(model, modules, owners, copied, beside)
    check_apart(model, modules, sites)
    check_names(model, modules, entries)
    tops = outermost(model)
    parents = _parents(modules, targets | {path: modules[path] for path in beside} | copied, tops)
    old = list(layers(model).values())
    carriers = {key_of(layer): layer for layer in old}
    wrappers = {id(wrapper.original_module): wrapper for wrapper in named(model, ModulesToSaveWrapper).values()}
    take_out(parts(model))

    disabled = bool(old) and all(layer.disable_adapters for layer in old)
    for path, entry in entries.items():
        module, site = targets[path], entry.site
        layer = carriers.get((id(module), site.leaf))
        if layer is None and site.kind in PARAMETERS:
            layer = tops[id(module)] = ParameterLayer(tops.get(id(module), module), site.leaf)
        elif layer is None:
            layer = BaseTunerLayer(module, [parent for parent, _ in parents[id(module)]])
        layer.add(adapter_name, entry, leaves[path])
        _hang(layer, parents[id(module)], disabled, tops.get(id(module)))
    for path, module in saved.items():
        wrapper = wrappers.get(id(module)) or ModulesToSaveWrapper(module)
        wrapper.add(adapter_name, _inside(path, replaced, params))
        _hang(wrapper, parents[id(module)], disabled)
    embeddings = {id(one.token_adapter.base_layer): one for one in named(model, TrainableTokensWrapper).values()}
    for path, leaf, one in each(replaced):
        if leaf == TOKENS and one.rows is not None:
            tokens = embeddings.setdefault(id(modules[path]), TrainableTokensWrapper(modules[path], path))
            tokens.add(adapter_name, one.rows, None if params is None else params[path][leaf])
            _hang(tokens, parents[id(modules[path])], disabled)
    for path, (source, leaf, name) in followers.items():
        module = modules[path]
        if leaf == TOKENS:
            tokens = embeddings.setdefault(id(module), TrainableTokensWrapper(module, path))
            tokens.follow(adapter_name, embeddings[id(modules[source])])
            _hang(tokens, parents[id(module)], disabled)
            continue
        wrapper = wrappers.get(id(module)) or ModulesToSaveWrapper(module)
        at = next(one for one in saved if _within(source, [one]))
        owner: Any = named(model, ModulesToSaveWrapper)[at].modules_to_save[adapter_name]
        wrapper.add(adapter_name, tied={name: owner.get_parameter(f"{source}.{leaf}".removeprefix(f"{at}."))})
        _hang(wrapper, parents[id(module)], disabled)
    mine = [(path, leaf) for path, leaf, _ in each(replaced) if leaf == "bias" and not _within(path, saved)]
    if config.bias != "none" and mine:
        given = {} if params is None else {path: params[path][leaf] for path, leaf in mine}
        vars(model)[ATTRIBUTE] = Biases(adapter_name, {path: modules[path] for path, _ in mine}, given)
        if disabled:
            vars(model)[ATTRIBUTE].enable_adapters(False)
    if not hasattr(model, "peft_config"):
        vars(model)["peft_config"] = {}
    configs: Any = model.peft_config
    configs[adapter_name] = config
    if not old:
        model.requires_grad_(False)
    for part in parts(model):
        part.activate([adapter_name], not config.inference_mode)
    root.attach(model)


def _check_biases(model: nn.Module, config: AdapterConfig) -> None:
    """Refuse a second adapter that trains the base's biases where they are, as PEFT does."""
    biases = biases_of(model)
    if biases is not None and config.bias != "none":
        raise ValueError(
            f"bias is {config.bias!r}, and adapter {biases.adapter!r} trains biases of this model already, which only "
            "one adapter can; set bias='none', or use bind(model, {...}), where each has its own"
        )


def _followers(
    replaced: Plan, modules: Mapping[str, nn.Module], saved: Iterable[str]
) -> dict[str, tuple[str, str, str]]:
    """The modules that have a tensor in common with one that is trained: its path, the leaf, and the tensor's name."""
    found: dict[str, tuple[str, str, str]] = {}
    for path, leaf, one in each(replaced):
        seen = {id(modules[path])}
        for name in one.names if leaf == TOKENS or leaf == "weight" else ():
            owner, _, own = name.rpartition(".")
            if id(modules[owner]) not in seen and not _within(owner, saved):
                seen.add(id(modules[owner]))
                found[owner] = path, leaf, own
    return found


def _within(path: str, saved: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in saved)


def _inside(path: str, replaced: Plan, params: Tree | None) -> dict[str, Tensor]:
    """The given tensors of one of `modules_to_save`, by the names that they have in it."""
    if params is None:
        return {}
    prefix = f"{path}."
    return {
        name.removeprefix(prefix): params[owner][leaf]
        for owner, leaf, one in each(replaced)
        for name in one.names
        if name.startswith(prefix)
    }


def _hang(part: Any, places: list[tuple[nn.Module, str]], disabled: bool, top: nn.Module | None = None) -> None:
    """Put a part, or the layer at the top of those around its module, where the module hangs."""
    for parent, name in places:
        parent._modules[name] = top or part
    if disabled and not part.disable_adapters:
        part.enable_adapters(False)


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
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{type(config).__name__}: state_dict is given with target_parameters, whose keys do not say which "
            "parameter they are of; inject without it, then set_peft_model_state_dict, or load_adapter"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if (split := split_key(config, key)) is not None:
            found.setdefault(split[0], {})[split[1]] = tensor
    if not found:
        raise ValueError(
            f"state_dict has no key of {config.method.name}, expected keys like '<module>.{config.form.leaves[0]}'"
        )
    unknown = sorted(path for path in found if path not in modules)
    if unknown:
        raise ValueError(f"state_dict names modules that the model does not have: {names_of(unknown)}")
    paths = [path for path in modules if path in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            named = {path for path, _ in with_parts(modules, find_targets(config, modules, model))}
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
    weights: Weights,
    meta: bool,
    params: Tree | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each site: planted, empty, or drawn and cast to what the base has."""
    shapes = {path: config.method.shapes(config, site) for path, site in sites.items()}
    if params is not None:
        planted = {path: {leaf: nn.Parameter(params[path][leaf].detach()) for leaf in shapes[path]} for path in sites}
        return {path: planted[path] | _fixed(config, site, modules, meta) for path, site in sites.items()}
    if meta:
        with torch.device("meta"):
            drawn = {path: {leaf: torch.empty(shape) for leaf, shape in shapes[path].items()} for path in sites}
    else:
        drawn = config.method.init(config, list(sites.values()), None, weights)
    made = {}
    for path in sites:
        weight = sites[path].like(modules[sites[path].owner])
        dtype = trainable_dtype(weight)
        device = "meta" if meta else weight.device
        made[path] = {
            leaf: nn.Parameter(agreed(tensor, weight).to(device, dtype)) for leaf, tensor in drawn[path].items()
        }
        made[path] |= _fixed(config, sites[path], modules, meta)
    return made


def _fixed(config: AdapterConfig, site: Site, modules: Mapping[str, nn.Module], meta: bool) -> dict[str, nn.Parameter]:
    """The leaves of a site that are not trained."""
    weight = site.like(modules[site.owner])
    dtype = trainable_dtype(weight)
    device = "meta" if meta else weight.device
    tensors = config.form.fixed_tensors(config, site)
    return {leaf: nn.Parameter(tensor.to(device, dtype, copy=True), False) for leaf, tensor in tensors.items()}


def _started(config: AdapterConfig, site: Site, leaves: Mapping[str, Tensor]) -> Site:
    """The site with the values that leaves started with as their dtype has them."""
    names = {name: leaf for leaf, name in config.form.starts.items() if name in site.constants}
    rounded = {name: site.constants[name].to(leaves[leaf].dtype) for name, leaf in names.items()}
    return dataclasses.replace(site, constants={**site.constants, **rounded}) if rounded else site


def _parents(
    modules: Mapping[str, nn.Module], wanted: Mapping[str, nn.Module], tops: Mapping[int, nn.Module]
) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each wanted module hangs, or the layer of its parameters does, by its id.

    Nowhere, if something else of ours hangs in its place already.
    """
    paths = {id(module): path for path, module in wanted.items()}
    bare = {id(top): key for key, top in tops.items()}
    parents: dict[int, list[tuple[nn.Module, str]]] = {key: [] for key in paths}
    for module in dict.fromkeys(modules.values()):
        for name, child in module._modules.items():
            if child is None:
                continue
            parent, name, child = _within_wrappers(module, name, child)
            if (key := bare.get(id(child), id(child))) in paths:
                if name == "_orig_mod":
                    raise ValueError(
                        f"{paths[key]}: was compiled by itself, and would go on without the adapter; inject first and "
                        "compile afterwards"
                    )
                parents[key].append((parent, name))
        _check_plain(module, paths)
    return parents


def _within_wrappers(parent: nn.Module, name: str, child: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """Where a child hangs: in its parent, or in the last of the wrappers around it."""
    while (inner := child_of_wrapper(child)) is not None:
        parent, name, child = child, inner, child._modules[inner]  # type: ignore[assignment]
    return parent, name, child


def _check_plain(module: nn.Module, targeted: Mapping[int, str]) -> None:
    """Refuse a target that is also kept where no replacement reaches it."""
    for attribute, value in vars(module).items():
        if attribute in ("_modules", "_parameters", "_buffers"):
            continue
        held = value.values() if isinstance(value, dict) else value
        items = list(held) if isinstance(value, (dict, list, tuple, set)) else [value]
        for item in items:
            owner = getattr(item, "__self__", item)
            if id(owner) in targeted and owner is not module:
                raise ValueError(
                    f"{targeted[id(owner)]}: {type(module).__name__}.{attribute} keeps this module too, outside of the "
                    "module tree, and would go on with the one without adapter; keep it in a submodule or a "
                    "ModuleList, leave it out of target_modules and modules_to_save, or use bind(model, config), which "
                    "follows it"
                )
