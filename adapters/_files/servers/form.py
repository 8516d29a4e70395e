"""A LoRA in the form that an engine reads: factors whose product is the whole change of a weight, scaling factor one.

    B' = s B,    lora_alpha = r,    so that  lora_alpha / r = 1  however an engine finds the two

Where an engine has one rank for all modules, thinner factors get rows and columns of zeros; where it fuses projections
or wants all layers, those that are not adapted get factors of zeros; where it reads experts one by one, stacked ones
are taken apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import Site, Tree, describe, modules_of, sort

from ..._arithmetic.products import Product, config_of_ranks, products
from ..._calibration.initial.configs import PLAIN
from ..._config.base import AdapterConfig
from ..._config.experts import NEW_NAMES
from ..._config.keys import PREFIX, places, split_key, to_keys
from ..disk.headers import Spec
from .engines import Server
from .rules import of_fields, of_method, problems

Factors = dict[str, Product]


def as_served(
    server: Server, config: AdapterConfig, model: nn.Module, sites: Mapping[str, Site], state: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return the config and the tensors of an adapter's files in the form that an engine reads.

    Args:
        server: The engine.
        config: The adapter's config.
        model: Its model.
        sites: Its sites, by path.
        state: Its tensors, under PEFT's keys.

    Raises:
        UnsupportedConfig: What the engine cannot have, all of it, each with what to do.
    """
    _refuse_kinds(server, sites)
    tree, rest = _tree_of(config, sites, state)
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    made, leaves = _served(server, config, tree, kind, modules_of(model))
    result = to_keys(made, leaves, PREFIX, {path: at for path, at in places(sites).items() if path in leaves}) | rest
    _refuse_problems(server, made, result)
    return made, result


def as_served_files(server: Server, config: AdapterConfig, tree: Tree) -> tuple[AdapterConfig, Tree]:
    """Return the config and the tree of an adapter in the form that an engine reads, told from its files alone.

    Modules that an engine wants adapted beside others are not seen then.

    Raises:
        UnsupportedConfig: What the engine cannot have, all of it, each with what to do.
    """
    made, leaves = _served(server, config, tree, "", {})
    _refuse_problems(server, made, to_keys(made, leaves, PREFIX))
    return made, leaves


def _served(
    server: Server, config: AdapterConfig, tree: Tree, kind: str, modules: Mapping[str, nn.Module]
) -> tuple[AdapterConfig, Tree]:
    """Return config and leaves, of all modules that the engine wants adapted."""
    any_list = dataclasses.replace(server, needs_list=False)  # a list is made here
    refuse(server, [*of_method(server, config.to_dict())] or [*of_fields(any_list, config.to_dict())])
    factors = dict(_taken_apart(server, kind, products(config, tree, f"{server.title}: the adapter")))
    factors |= _zeros(server, factors, modules)
    factors = {path: _padded(server, factors, one) for path, one in factors.items()}
    leaves = {
        path: {name: leaf.to(one.dtype) for name, leaf in one.layout.leaves(one.a, one.b).items()}
        for path, one in factors.items()
    }
    return _config(config, factors, set(tree) == set(factors)), sort(leaves)


def _refuse_problems(server: Server, config: AdapterConfig, state: Mapping[str, Tensor]) -> None:
    specs = {key: Spec(tensor.dtype, tuple(tensor.shape), 0, 0) for key, tensor in state.items()}
    refuse(server, problems(server, config.to_dict(), specs))


def refuse(server: Server, found: list[str]) -> None:
    """Raise an error of what an engine cannot have, if there is any.

    Raises:
        UnsupportedConfig: Has all of it.
    """
    if found:
        lines = "".join(f"\n- {one}" for one in found)
        raise UnsupportedConfig(f"{server.title} cannot serve this adapter, and nothing was written:{lines}")


def _refuse_kinds(server: Server, sites: Mapping[str, Site]) -> None:
    kinds = {path: site.kind for path, site in sites.items() if site.kind not in ("linear", "embedding", "experts")}
    found = [f"{path} is of kind {kind!r}; {server.title} adapts linear layers" for path, kind in kinds.items()]
    more = [f"and {len(found) - 4} more of these"] if len(found) > 4 else []
    refuse(server, [f"{one}; leave it out of the targets, or merge the adapter" for one in found[:4]] + more)


def _tree_of(
    config: AdapterConfig, sites: Mapping[str, Site], state: Mapping[str, Tensor]
) -> tuple[Tree, dict[str, Tensor]]:
    """Return the tree made from keys, by the sites' paths, and tensors that are no leaves."""
    paths = {place: path for path, place in places(sites).items()}
    tree: Tree = {}
    rest = {}
    for key, tensor in state.items():
        part = split_key(config, key)
        if part is not None and part[0] in paths:
            tree.setdefault(paths[part[0]], {})[part[1]] = tensor
        else:
            rest[key] = tensor
    return tree, rest


def _config(config: Any, factors: Factors, same_sites: bool) -> Any:
    ranks = {path: one.layout.rank(one.a) for path, one in factors.items()}
    fields = {**PLAIN, **config_of_ranks(ranks)}
    if not same_sites or isinstance(config.target_modules, str):
        stacked = [path for path, one in factors.items() if one.layout.kind == "experts"]
        fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        fields |= {"target_modules": sorted(set(factors) - set(stacked)), "target_parameters": stacked or None}
    return dataclasses.replace(config, **fields)


def _padded(server: Server, factors: Factors, one: Product) -> Product:
    """Return a product whose `B` has the scaling factor, of the rank that the engine wants."""
    b = one.b * one.scaling
    missing = 0
    if not server.patterns:
        missing = server.rank(max(other.a.shape[-2] for other in factors.values())) - one.a.shape[-2]
    a = torch.nn.functional.pad(one.a, (0, 0, 0, missing))
    return dataclasses.replace(one, a=a, b=torch.nn.functional.pad(b, (0, missing)), scaling=1.0)


# -- experts -------------------------------------------------------------------------------------------------------


def _taken_apart(server: Server, kind: str, factors: Factors) -> Iterator[tuple[str, Product]]:
    """Yield products by path, those of stacked experts one by one where the engine reads them so."""
    names = NEW_NAMES.get(kind, {})
    for path, one in factors.items():
        owner, _, leaf = path.rpartition(".")
        old = [name for name, new in names.items() if new == leaf]
        if one.layout.kind != "experts" or kind in server.stacked or (server.experts == "any" and not old):
            yield path, one
            continue
        if not old or server.experts == "none":
            known = "experts, which it does not adapt; leave them out" if not old else f"experts of a {kind or 'model'}"
            refuse(server, [f"{path}: {known}, or merge the adapter into the base"])
        yield from _each_expert(owner, old, one)


def _each_expert(owner: str, names: list[str], one: Product) -> Iterator[tuple[str, Product]]:
    """Yield the products of each expert's own projections, which share `A` where they were one parameter."""
    layout = dataclasses.replace(one.layout, kind="matrix", blocks=1)
    for expert in range(one.layout.blocks):
        for name, b in zip(names, one.b[expert].chunk(len(names)), strict=True):
            yield f"{owner}.{expert}.{name}", dataclasses.replace(one, a=one.a[expert, None], b=b[None], layout=layout)


# -- modules that are not adapted ----------------------------------------------------------------------------------


def _zeros(server: Server, factors: Factors, modules: Mapping[str, nn.Module]) -> Factors:
    """Return factors of zeros for modules that an engine wants adapted because others are."""
    found = {}
    for path, like in _wanted(server, factors, modules):
        site = describe(path, modules[path]) if path in modules and path not in factors else None
        if site is not None and site.kind == "linear":
            a = like.a.new_zeros(1, like.a.shape[-2], site.in_features)
            b = like.b.new_zeros(1, site.out_features, like.a.shape[-2])
            layout = dataclasses.replace(like.layout, names=("lora_A", "lora_B"), inputs=(site.in_features,))
            found[path] = dataclasses.replace(like, a=a, b=b, bias=None, layout=layout)
    return found


def _wanted(server: Server, factors: Factors, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Product]]:
    """Yield paths of such modules, each with factors of one that it goes with."""
    for path, one in factors.items():
        parent, _, name = path.rpartition(".")
        for names in server.together:
            if name in names:
                yield from ((f"{parent}.{other}".lstrip("."), one) for other in names)
    layers = {_in_any_layer(path): one for path, one in factors.items() if one.layout.kind == "matrix"}
    for path in modules if server.all_layers else ():
        if _in_any_layer(path) in layers and path != _in_any_layer(path):
            yield path, layers[_in_any_layer(path)]


def _in_any_layer(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path, count=1)
