"""What the forward of a layer needs of its active adapters, collected when they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.utils.weak import WeakIdKeyDictionary

from torchgraft.functional.adapted import Adapted, Base, Cell, Socket, adapted_class, inner_class
from torchgraft.functional.layers import plain_class
from torchgraft.functional.method import Entry

if TYPE_CHECKING:
    from .layer import BaseTunerLayer

_COPIES: Any = WeakIdKeyDictionary()
"""Constants on other devices, so that layers that share one keep sharing it."""


_REGISTRY = ("_modules", "_parameters")


class CalledBase(Base):
    """The wrapped module, called as a module, so that its own hooks run."""

    __slots__ = ()

    def run(self, x: Tensor) -> Tensor:
        return self.module(x, *self.args, **self.kwargs)

    @property
    def plain(self) -> tuple[Tensor, Tensor | None] | None:  # type: ignore[override]
        """As in `Base`, unless a hook or a forward of the module's own wants to see the call."""
        own = vars(self.module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        return None if "forward" in own or has_global_hooks() else super().plain


def own_or_computed(module: Any, name: str) -> Tensor:
    """What a module has under a name, without `nn.Module.__getattr__` where it is a parameter."""
    own = module._parameters.get(name)
    return getattr(module, name) if own is None else own


class Live:
    """The adapters that run, the innermost first, under names that stay the same when others become active.

    A compiled forward guards on every name it reads, so with the adapters' names it would be compiled for each.

    Attributes:
        names: Their names, which the forward does not read.
        entries: Config and site of each, with constants where the base is.
        held: Leaves of each, as `BaseTunerLayer.held` has them.
        shell: Stands for a wrapped module of a class with its own forward (scaled embeddings).
    """

    def __init__(self, layer: BaseTunerLayer, names: Iterable[str]):
        self.names = list(names)
        own = [layer.entries[name] for name in self.names]
        self.entries = [placed(entry, entry.site.like(layer.base_layer).device) for entry in own]
        self._hold(layer)
        base: Any = layer.base_layer
        plain: Any = plain_class(base)
        attention = any(entry.site.kind == "attention" for entry in self.entries)
        inherited = type(base).forward is plain.forward and not attention
        self.shell = None if inherited or not self.names else Shell(base, plain, self.entries)

    def _hold(self, layer: BaseTunerLayer) -> None:
        """Take the leaves as they are, and where they hang."""
        self.held = [layer.held(name) for name in self.names]
        containers: Any = layer._modules
        self._watched = [
            (attribute, containers[attribute], vars(containers[attribute])[_REGISTRY[part is None]], name, one)
            for name, held in zip(self.names, self.held, strict=True)
            for _, one, attribute, part in held
        ]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def leaves(self) -> list[dict[str, Tensor]]:
        """The parameters of each adapter, as they are now."""
        return [
            {leaf: one if part is None else own_or_computed(one, part) for leaf, one, _, part in held}
            for held in self.held
        ]

    def over(self, base: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Base | Adapted:
        """The adapters around a wrapped module."""
        layer: Base | Adapted = CalledBase(base, self.entries[0].site, args, kwargs)
        for entry, leaves in zip(self.entries, self.leaves(), strict=True):
            layer = Adapted(layer, entry, leaves)
        return layer

    def dense(self, base: Any, name: str) -> Tensor | None:
        """The weight or bias that a wrapped module stores under a name, with the adapters in, in the base's dtype."""
        site = self.entries[0].site
        value = site.stored(*self.over(base).dense()).get(name)
        return None if value is None else value.to(site.like(base).dtype)

    def run(self, base: Any, x: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The adapted output."""
        if self.shell is None:
            return self.over(base, args, kwargs)(x)
        return self.shell.run(base, self.leaves(), x, args, kwargs)

    def stale(self, layer: BaseTunerLayer) -> bool:
        """Whether somebody replaced a parameter, or the module that holds it, since this was collected."""
        containers: Any = layer._modules
        for attribute, container, registry, name, one in self._watched:
            if registry.get(name) is not one or containers[attribute] is not container:
                return True
        return False


class Shell:
    """A module of a class with its own forward, with the adapters around the forward that this one inherits.

    It shares the wrapped module's tensors, hooks and flags; the wrapped module itself stays as it is.
    """

    def __init__(self, base: Any, plain: Any, entries: list[Entry]):
        self.cell = Cell()
        cls: Any = type(base)
        self.inner: Any = object.__new__(inner_class(cls, plain))
        self.module: Any = object.__new__(adapted_class(cls, plain, entries[0].site))
        state: dict[str, Any] = {}
        for one in (self.inner, self.module):
            object.__setattr__(one, "__dict__", state)
        named = {str(index): entry for index, entry in enumerate(entries)}
        self.socket = Socket(entries[0].site.path, self.cell, named, self.inner, "input", cls, plain)
        self.follow(base)

    def follow(self, base: Any) -> None:
        """Take over what the wrapped module has now."""
        vars(self.module).update(vars(base), _socket=self.socket)

    def run(self, base: Any, leaves: list[dict[str, Tensor]], x: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The adapted output."""
        if not torch.compiler.is_compiling():
            self.follow(base)
        path = self.socket.path
        self.cell.trees = {str(index): {path: one} for index, one in enumerate(leaves)}
        return self.module(x, *args, **kwargs)


def placed(entry: Entry, device: torch.device) -> Entry:
    """An adapter's entry with its constants on a device."""
    here = {key: value for key, value in entry.site.constants.items() if isinstance(value, Tensor)}
    if all(value.device == device for value in here.values()):
        return entry
    moved = {key: _COPIES.setdefault(value, {}).setdefault(device, value.to(device)) for key, value in here.items()}
    site = dataclasses.replace(entry.site, constants={**entry.site.constants, **moved})
    return dataclasses.replace(entry, site=site)
