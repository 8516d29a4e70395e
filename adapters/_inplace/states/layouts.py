"""Where an injected adapter is: its config, its sites, and what the keys of its tensors depend on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchgraft.functional.extending import (
    Site,
    TiedAdapter,
)

from ..._config.base import AdapterConfig
from ..._config.keys import SHARED, places
from ..placed import Layout, Slot
from ..switch import check_known
from ..walk import layers, named_parts


def config_of(model: nn.Module, adapter_name: str) -> AdapterConfig:
    """Return the config of an injected adapter.

    Raises:
        TypeError: No name; a model with another library's adapters.
        ValueError: A name that the model does not have.
    """
    configs: Any = getattr(model, "peft_config", {})
    if not isinstance(adapter_name, str) or not isinstance(configs.get(adapter_name), AdapterConfig):
        check_known(model, [adapter_name])
    result: AdapterConfig = configs[adapter_name]
    return result


def source_sites(model: nn.Module, adapter_name: str) -> dict[str, Site]:
    """Return the sites where an adapter has parameters of its own, by path.

    Raises:
        ValueError: A module that follows one of these with another scaling factor.
    """
    found = layers(model).items()
    entries = {path: layer.entries[adapter_name] for path, layer in found if adapter_name in layer.entries}
    sites = {path: entry.site for path, entry in entries.items() if not isinstance(entry, TiedAdapter)}
    for path, entry in entries.items():
        if not isinstance(entry, TiedAdapter):
            continue
        given, expected = (one.constants.scaling for one in (entry.site, sites[entry.tied.source]))
        if given != expected:
            raise ValueError(
                f"{path}: scaling of adapter {adapter_name!r} is {given}, and {expected} at {entry.tied.source}, to "
                "which it is tied and whose parameters it has; write the same to both"
            )
    return sites


def shared_tensors(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, Tensor]:
    """Return constants of an adapter that its files hold, by key."""
    if not config.form.saves_shared(config):
        return {}
    entries = (layer.entries[adapter_name] for layer in layers(model).values() if adapter_name in layer.entries)
    shared = config.form.shared_tensors(entry.site for entry in entries)
    return {f"{SHARED}{name}": tensor for name, tensor in shared.items()}


def shared_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Return keys in files of the leaves that an adapter's layers share."""
    entries: list[Any] = [one.entries[adapter_name] for one in layers(model).values() if adapter_name in one.entries]
    names = dict.fromkeys(name for one in entries for name in one.config.form.together(one.site).values())
    return [f"{SHARED}{name}" for name in names]


def layout_of(model: nn.Module, adapter_name: str) -> Layout:
    """Return what the keys of an adapter's tensors depend on.

    Raises:
        ValueError: A name that the model does not have.
    """
    config, carriers = config_of(model, adapter_name), layers(model)
    entries = {path: layer.entries[adapter_name] for path, layer in carriers.items() if adapter_name in layer.entries}
    where = places({path: entry.site for path, entry in entries.items()})
    return Layout(adapter_name, config, carriers.keys(), where, unmerged_tensors(model))


def unmerged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors of the base as they are without what is merged, by name; those that merging changed."""
    found: dict[str, Tensor] = {}
    for path, part in named_parts(model):
        found |= part.unmerged_tensors(path)
    return found


def slots_of(model: nn.Module, layout: Layout) -> dict[str, Slot]:
    """Return each tensor of an adapter by its key in files."""
    found: dict[str, Slot] = {}
    for path, part in named_parts(model):
        for key, slot in part.adapter_slots(path, layout).items():
            found.setdefault(key, slot)  # what layers share has the name that it has in the first
    return found
