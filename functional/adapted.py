"""Adapted modules: the user's own classes, with the adapter in their forward and in their weight."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Finder
from .method import Entry, Leaves
from .routed import NoWeight, RoutedLayer
from .site import Site


class Base:
    """The base module under its own class: no hooks, no adapter, canonical weight."""

    __slots__ = ("args", "kwargs", "module", "site")

    def __init__(self, module: Any, site: Site, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        self.module, self.site, self.args, self.kwargs = module, site, args, kwargs or {}

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x, *self.args, **self.kwargs)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        bias = self.module.bias if self.site.has_bias else None
        return self.site.canonical(self.module.weight), bias

    @property
    def weight(self) -> Tensor:
        return self.dense()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.dense()[1]

    @property
    def training(self) -> bool:
        return self.module.training


class Adapted:
    """A layer with one adapter on it; layers nest, the first adapter innermost."""

    __slots__ = ("base", "entry", "leaves")

    def __init__(self, base: Base | Adapted, entry: Entry, leaves: Leaves):
        self.base, self.entry, self.leaves = base, entry, leaves

    def __call__(self, x: Tensor) -> Tensor:
        entry = self.entry
        return entry.config.method.apply(entry.config, entry.site, self.leaves, self.base, x)

    def over(self, base: Any) -> Adapted:
        """The same adapter on another layer."""
        return Adapted(base, self.entry, self.leaves)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias with every adapter up to this one in, not yet rounded."""
        return self.entry.merge(self.leaves, *self.base.dense())

    @property
    def weight(self) -> Tensor:
        return self.dense()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.dense()[1]

    @property
    def training(self) -> bool:
        return self.base.training


class Cell:
    """What one call tells its sites. Each skeleton has one, so threads never share it.

    Attributes:
        trees: The active trees by adapter name, or what stands for one (`Active`).
        finder: Finds where the rows of a routed call are in a site's input.
        seen: Collects each site's input where somebody wants to look.
        reached: Collects the paths of the sites that ran.
        lease: Keeps the skeleton from being used by another call.
    """

    __slots__ = ("__weakref__", "finder", "lease", "reached", "seen", "trees")

    def __init__(self) -> None:
        self.trees: Mapping[str, Any] | None = None
        self.finder: Finder | None = None
        self.seen: list[tuple[str, Tensor]] | None = None
        self.reached: set[str] | None = None
        self.lease: Any = None


@dataclasses.dataclass(eq=False)
class Socket:
    """Everything an adapted module knows beyond its class."""

    path: str
    cell: Cell
    entries: Mapping[str, Entry]
    inner: Any
    argument: str

    def layer(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """The base under the active adapters, the first innermost."""
        trees = self.cell.trees
        if trees is None:
            raise RuntimeError(
                f"{self.path}: this adapted module ran outside any call of its graft. If the model checkpoints "
                "activations, use use_reentrant=False; to keep an adapted module, take it from graft.view(params)"
            )
        layer: Any = None
        for name, entry in self.entries.items():
            tree = trees.get(name)
            if tree is not None:
                below = layer or Base(self.inner, entry.site, args, kwargs)
                if type(tree) is dict:
                    layer = Adapted(below, entry, tree[entry.site.path])
                else:
                    layer = tree.layer(below, entry, self.cell.finder)
        if self.cell.reached is not None:
            self.cell.reached.add(self.path)
        return layer or Base(self.inner, next(iter(self.entries.values())).site, args, kwargs)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Stored weight and bias with the active adapters in, in the base's dtype."""
        layer = self.layer()
        if isinstance(layer, Base):
            return self.inner.weight, self.inner.bias
        if _is_routed(layer):
            return self._without_value()
        weight, bias = layer.dense()
        weight = layer.entry.site.canonical(weight).to(self.inner.weight.dtype)
        return weight, None if bias is None else bias.to(self.inner.bias.dtype)

    def _without_value(self) -> tuple[Tensor, Tensor | None]:
        """What stands for weight and bias where each row has its own: some parents ask a weight for its dtype."""
        weight, bias = self.inner.weight, self.inner.bias if hasattr(self.inner, "bias") else None
        if torch.compiler.is_compiling():  # mixing it with the model's tensors is an error there
            return weight.detach().to("meta"), None if bias is None else bias.detach().to("meta")
        return NoWeight.of(weight, self.path), None if bias is None else NoWeight.of(bias, self.path)


def _is_routed(layer: Any) -> bool:
    while not isinstance(layer, RoutedLayer):
        if not isinstance(layer, Adapted):
            return False
        layer = layer.base
    return True


class AdaptedModule:
    """Mixed into the class of a targeted module: same attributes, adapted forward, adapted `weight` and `bias`.

    Parents that read `child.weight` instead of calling the child get the dense meaning, differentiable.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        socket: Socket = self.__dict__["_socket"]
        if args:
            x, args = args[0], args[1:]
        elif socket.argument in kwargs:
            x = kwargs.pop(socket.argument)
        else:
            raise TypeError(f"{socket.path}: forward() got no {socket.argument!r}")
        if socket.cell.seen is not None:
            socket.cell.seen.append((socket.path, x))
        y = socket.layer(args, kwargs)(x)
        if socket.cell.lease is not None and y.requires_grad and not torch.compiler.is_compiling():
            _pin(socket.cell, y)
        return y

    @property
    def weight(self) -> Tensor:
        return self.__dict__["_socket"].dense()[0]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["_socket"].inner.weight = value

    @property
    def bias(self) -> Tensor | None:
        return self.__dict__["_socket"].dense()[1]

    @bias.setter
    def bias(self, value: Tensor | None) -> None:
        self.__dict__["_socket"].inner.bias = value

    def extra_repr(self) -> str:
        socket: Socket = self.__dict__["_socket"]
        names = ", ".join(f"{name!r}: {entry.config.method.name}" for name, entry in socket.entries.items())
        described = super().extra_repr()  # type: ignore[misc]
        return f"{described}, adapters={{{names}}}" if described else f"adapters={{{names}}}"


def _pin(cell: Cell, y: Tensor) -> None:
    """Tie the call's skeleton to the autograd graph where saved tensors go through hooks.

    Activation checkpointing runs the forward once more during backward and must find the same adapter.
    """
    if y.grad_fn is not None and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        metadata: Any = y.grad_fn.metadata
        metadata[id(cell)] = cell.lease


@functools.lru_cache(maxsize=256)
def _adapted_class(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (AdaptedModule, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def adapt(shell: nn.Module, cls: type[nn.Module], path: str, cell: Cell, entries: Mapping[str, Entry]) -> None:
    """Turn a bare copy of a module into an adapted one, in place.

    The copy keeps its `__dict__`; a second object of the plain class shares that dict and is the base layer, so
    hooks, flags and tensors stay one set.
    """
    inner = object.__new__(cls)
    object.__setattr__(inner, "__dict__", shell.__dict__)
    argument = next(iter(list(inspect.signature(cls.forward).parameters)[1:]), "input")
    shell.__class__ = _adapted_class(cls)  # type: ignore[arg-type]  # a class is hashable
    shell.__dict__["_socket"] = Socket(path, cell, entries, inner, argument)
