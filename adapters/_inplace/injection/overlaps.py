"""What cannot be on one module at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torchgraft.functional.extending import Site, SiteAdapter

from ..beside.modules_to_save import ModulesToSaveWrapper
from ..beside.tokens import TrainableTokensWrapper
from ..layer.leaves import key_of
from ..walk import layers, named


def check_overlap(
    model: nn.Module, modules: Mapping[str, nn.Module], paths: Iterable[str], saved: Mapping[str, nn.Module]
) -> None:
    """Refuse an adapter on a module that another adapter, or this one, has a copy of, and copies within copies."""
    adapted = {id(layer.get_base_layer()): path for path, layer in layers(model).items()}
    adapted |= {id(modules[path]): path for path in paths}
    copied = {path: wrapper.original_module for path, wrapper in named(model, ModulesToSaveWrapper).items()}
    copied |= saved
    names = {id(module): path for path, module in copied.items()}
    for path, module in copied.items():
        for inner in module.modules():
            if id(inner) in adapted:
                raise ValueError(
                    f"{adapted[id(inner)]}: {path} is one of modules_to_save, of which adapters train copies, so "
                    "nothing in it can carry an adapter; leave the one out of target_modules or the other out of "
                    "modules_to_save"
                )
            if inner is not module and id(inner) in names:
                raise ValueError(
                    f"modules_to_save names {names[id(inner)]}, which is a part of {path}; name one of them"
                )


def check_tokens(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sites: Iterable[str],
    copied: Mapping[str, nn.Module],
    beside: Iterable[str],
) -> None:
    """Refuse an adapter, or a copy, on a module of which tokens are trained."""
    tokens = {id(one.token_adapter.base_layer): path for path, one in named(model, TrainableTokensWrapper).items()}
    tokens |= {id(modules[path]): path for path in beside}
    others: dict[int, str] = {id(modules[path]): "carries an adapter" for path in sites}
    others |= {id(layer.get_base_layer()): "carries an adapter" for layer in layers(model).values()}
    whole = [*copied.values(), *(one.original_module for one in named(model, ModulesToSaveWrapper).values())]
    others |= {id(inner): "is one of modules_to_save" for module in whole for inner in module.modules()}
    for key, path in tokens.items():
        if key in others:
            raise ValueError(
                f"{path}: {others[key]}, and tokens of it are trained (trainable_token_indices, or a tie to such a "
                "module), which cannot both be done in place; leave one out, or use bind(model, config)"
            )


def check_apart(model: nn.Module, modules: Mapping[str, nn.Module], sites: Mapping[str, Site]) -> None:
    """Refuse an adapter on a module of which a parameter is adapted, or the reverse."""
    whole = {id(layer.get_base_layer()): not layer.parameter_name for layer in layers(model).values()}
    for path, site in sites.items():
        parameter = site.is_parameter
        if whole.get(id(modules[site.owner]), not parameter) is parameter:
            what = "this module as a whole" if parameter else "a parameter of this module"
            raise ValueError(
                f"{path}: another adapter is on {what}, and the two cannot be nested; target the one or the other, or "
                "unload(model) first"
            )


def check_names(model: nn.Module, modules: Mapping[str, nn.Module], entries: Mapping[str, SiteAdapter]) -> None:
    """Refuse a method whose parameters have the names of another method's modules on one layer, or the reverse."""
    carriers = {key_of(layer): layer for layer in layers(model).values()}
    for path, entry in entries.items():
        layer = carriers.get((id(modules[entry.site.owner]), entry.site.leaf))
        for name, other in layer.entries.items() if layer is not None else ():
            own, theirs = (_places(one.config, one.site) for one in (entry, other))
            taken = [one for one in own if one in theirs and own[one] != theirs[one]]
            if taken:
                methods = entry.config.method.name, other.config.method.name
                raise ValueError(
                    f"{path}: adapter {name!r} is {methods[1]}, and {methods[0]} has another kind of {taken[0]!r}, as "
                    "in PEFT, so one layer cannot have both; delete_adapter(model, name) first, target others, or "
                    "use bind(model, {...}), where each has its own"
                )


def _places(config: Any, site: Site) -> dict[str, tuple[bool, bool]]:
    """The attributes of a layer that hold leaves, whether these are bare parameters, and whether layers share them."""
    where = config.form.places(site).items()
    together = config.form.together(site)
    return {attribute: (part is None, leaf in together) for leaf, (attribute, part) in where}
