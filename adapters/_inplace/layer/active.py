"""What the forward of a layer needs of its active adapters, collected when they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torchgraft.functional.extending import (
    Adapted,
    Base,
    SiteAdapter,
    Step,
    beside,
    forward_class,
    linear_tensors,
    step_of,
    unwrapped,
)

from .called_base import CalledBase, CalledOverMerged, is_bare, is_parallel
from .containers import Parameters
from .decided import Decided
from .holders import Holders, Watch
from .shell import Shell
from .weights import MergingLayer

_COPIES: Any = WeakIdKeyDictionary()
"""Constants on other devices, so that layers that share one keep sharing it."""


_REGISTRY = ("_modules", "_parameters")
"""Where a container of modules, and one of bare parameters, has them."""


class ActiveAdapters:
    """The adapters that run, the innermost first, under names that stay the same when others become active.

    A compiled forward guards on every name it reads, so with the adapters' names it would be compiled for each.

    Attributes:
        names: Their names, which the forward does not read.
        entries: Config and site of each, with constants where the base is.
        merged: The base's original weights, while other adapters are merged into it.
        sharing: Whether one has leaves together with other layers.
        shell: Stands for a wrapped module of a class with its own forward (scaled embeddings).
        step: What calls take instead of layers, where that is decided.
        decided: The step with all that it takes, as the last call found it.
    """

    decided: Decided | None = None

    def __init__(self, layer: MergingLayer, names: Iterable[str]):
        self.names = list(names)
        self.merged = layer.originals if layer.merged else None
        base: Any = unwrapped(layer.base_layer)  # FSDP wraps the base in another module
        own = [layer.entries[name] for name in self.names]
        self.device = _device(own, base)
        self.entries = [placed(entry, self.device) for entry in own]
        self._hold(layer)
        self.shell: Shell | None = None
        self.step: Step | None = None
        if not self.entries:
            return
        inner: Any = forward_class(base)
        attention = any(entry.site.kind == "attention" for entry in self.entries)
        if attention or type(base).forward is not inner.forward or is_parallel(base, self.entries[0].site):
            self.shell = Shell(base, inner, self.entries, self.merged)
        elif self.merged is None:
            self.step = step_of(self.entries)

    def _hold(self, layer: MergingLayer) -> None:
        """Take the leaves as they are, and where they hang."""
        held = [layer.held(name) for name in self.names]
        self._places = [[(leaf, one, part, getattr(one, "__dict__", {})) for leaf, one, _, part in own] for own in held]
        self.sharing = any(entry.site.shared for entry in self.entries)
        casts = bool(getattr(layer, "cast_input_dtype_enabled", True))
        self.holders = [Holders(layer._modules, layer.made, name, layer.entries[name], casts) for name in self.names]
        self.watch = Watch(self.holders)
        self._containers: Any = layer._modules
        modules = self._containers
        self._hung = [
            (attribute, modules[attribute], registry, name, registry.get(name))
            for name in self.names
            for attribute in layer.attributes(name)
            for registry in [vars(modules[attribute])[_REGISTRY[isinstance(modules[attribute], Parameters)]]]
        ]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def leaves(self) -> list[dict[str, Tensor]]:
        """Return the parameters of each adapter, as they are now."""
        found = []
        for places in self._places:
            own: dict[str, Any] = {}
            for leaf, one, part, attributes in places:
                if part is not None:  # without nn.Module.__getattr__ where it is a parameter
                    tensor = attributes["_parameters"].get(part)
                    own[leaf] = getattr(one, part) if tensor is None else tensor
                else:
                    own[leaf] = one
            found.append(own)
        return self._together(found) if self.sharing else found

    def _together(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the leaves of each adapter, with those that layers share where its own are."""
        return [beside(entry.site, leaves) for entry, leaves in zip(self.entries, found, strict=True)]

    def over(
        self,
        base: Any,
        leaves: Iterable[dict[str, Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Base | Adapted:
        """Return the adapters around a wrapped module."""
        layer: Base | Adapted
        if self.merged is None:
            layer = CalledBase(base, self.entries[0].site, args, kwargs)
        else:
            layer = CalledOverMerged(base, self.entries[0].site, args, kwargs)
            layer.originals = self.merged
        for entry, own in zip(self.entries, leaves, strict=True):
            layer = Adapted(layer, entry, own)
        return layer

    def dense(self, base: Any, name: str) -> Tensor | None:
        """The weight or bias that a wrapped module stores under a name, with the adapters in, in the base's dtype."""
        site = self.entries[0].site
        stored = self.watch.amid(lambda: site.stored(*self.over(base, self.tensors(base.training)).dense()))
        value = stored.get(name)
        return None if value is None else value.to(site.like(base).dtype)

    def run(self, base: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the adapted output."""
        if self.device is None or self.watch.attached(base.training):
            return self._run_called(base, x, args, kwargs)
        leaves = self.leaves()
        if self.step is not None and not (args or kwargs or torch.compiler.is_compiling()) and is_bare(base):
            tensors = linear_tensors(base)
            y = None if tensors is None else self.step(x, *tensors, leaves[0], base.training)
            if y is not None:
                self._decide(base)
                return y
        if self.shell is None:
            return self.over(base, leaves, args, kwargs)(x)
        return self.shell.run(base, self.entries, leaves, x, args, kwargs)

    def _decide(self, base: Any) -> None:
        """Have later calls take the step at once, for as long as everything stays as it was found in this one."""
        if {"weight", "bias"} <= base._parameters.keys():
            registries = [self._containers, *(registry for _, _, registry, _, _ in self._hung)]
            step = cast(Step, self.step)
            self.decided = Decided(step, base, self.watch.modules, lambda: self.leaves()[0], registries)

    def _run_called(self, base: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the adapted output, through the modules that hold leaves."""
        if self.device is None:
            self.entries = [placed(entry, x.device) for entry in self.entries]

        def run() -> Tensor:
            leaves = self._together([holders.maps() for holders in self.holders])
            if self.shell is None:
                return self.over(base, leaves, args, kwargs)(x)
            return self.shell.run(base, self.entries, leaves, x, args, kwargs)

        result: Tensor = self.watch.amid(run)
        return result

    def tensors(self, training: bool) -> list[dict[str, Tensor]]:
        """Return the parameters of each adapter, as they are now, for code that computes with their numbers."""
        if not self.watch.attached(training):
            return self.leaves()
        return self._together([holders.maps(called=False) for holders in self.holders])

    def stale(self, containers: Mapping[str, Any]) -> bool:
        """Return whether a parameter, or the module that holds it, was replaced since this was collected.

        Args:
            containers: What hangs in the layer, by attribute.
        """
        for attribute, container, registry, name, one in self._hung:
            if registry.get(name) is not one or containers[attribute] is not container:
                return True
        base = containers["base_layer"]
        return (
            bool(base._forward_pre_hooks)
            and self.shell is None
            and bool(self)
            and is_parallel(base, self.entries[0].site)
        )


def _device(entries: Iterable[SiteAdapter], base: Any) -> torch.device | None:
    """Return where the constants of some entries have to be; `None` where the base's tensors say so only in a call.

    Offloaded ones rest on the meta device, and a module around the base may have taken them.
    """
    for entry in entries:
        try:
            device = entry.site.like(base).device
        except AttributeError:
            return None
        return None if device.type == "meta" else device
    return torch.device("cpu")


def placed(entry: SiteAdapter, device: torch.device | None) -> SiteAdapter:
    """Return an adapter's entry with its constants on a device."""
    if device is None:
        return entry
    tensors = {key: value for key, value in entry.site.constants.items() if isinstance(value, Tensor)}
    here = {key: value for key, value in tensors.items() if not value.is_meta}  # without values: a leaf has them
    if all(value.device == device for value in here.values()):
        return entry
    moved = {key: _COPIES.setdefault(value, {}).setdefault(device, value.to(device)) for key, value in here.items()}
    site = dataclasses.replace(entry.site, constants=entry.site.constants.replace(moved))
    return dataclasses.replace(entry, site=site)
