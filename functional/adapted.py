"""Adapted modules: the user's own classes, with the adapter in their forward and in their weight."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import saving
from .attention import AdaptedAttention, Part, Projection
from .finder import Finder
from .kernels import folded, is_folded, over_values
from .layers import is_plain_linear
from .method import Entry, Leaves, Weighted
from .placement import is_sharded, resting
from .routed import RoutedLayer, stand_in
from .sharded import run_on_shards
from .site import Site, check_base, check_leaves


class Base(Weighted):
    """The base module under its own class: no hooks, no adapter, canonical weight."""

    __slots__ = ("args", "kwargs", "module", "site")

    def __init__(self, module: Any, site: Site, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        self.module, self.site, self.args, self.kwargs = module, site, args, kwargs or {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x) if self.site.weight_names else self._packed(x)

    def run(self, x: Tensor) -> Tensor:
        """The module's own output."""
        module = self.module
        if torch.compiler.is_compiling():
            return type(module).forward(module, x, *self.args, **self.kwargs)
        if self.site.kind == "linear" and is_plain_linear(module) and not self.site.transposed:
            weight, bias = self.plain_tensors()
            check_base(self.site.path, weight, x)
            if is_folded(x, weight, bias):
                return folded(x, weight, bias)
        return type(module).forward(module, x, *self.args, **self.kwargs)

    def _packed(self, x: Tensor) -> Tensor:
        """The output with the gradient of the dequantised weight, where the kernel for a packed one has none."""
        y = self.run(x.detach())
        if not x.requires_grad:
            return y
        linear = F.linear(x, self.module.weight().dequantize())
        return y + (linear - linear.detach())

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""
        return self.site.read(self.module)

    @property
    def plain(self) -> tuple[Tensor, Tensor | None] | None:  # type: ignore[override]
        """Weight and bias where a call is just `F.linear` of them, else `None`."""
        if self.args or self.kwargs or not is_plain_linear(self.module):
            return None
        weight, bias = self.plain_tensors()
        return self.site.canonical(weight), bias

    def plain_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the module has them, where these are their names."""
        held = self.module._parameters  # without nn.Module.__getattr__, which takes longer than all else here
        weight, bias = (held[name] if name in held else getattr(self.module, name) for name in ("weight", "bias"))
        return weight, bias

    @property
    def training(self) -> bool:
        return self.module.training


class Adapted(Weighted):
    """A layer with one adapter on it; layers nest, the first adapter innermost."""

    __slots__ = ("base", "entry", "leaves")

    def __init__(self, base: Base | Adapted, entry: Entry, leaves: Leaves):
        self.base, self.entry, self.leaves = base, entry, leaves

    def __call__(self, x: Tensor) -> Tensor:
        entry = self.entry
        for leaf in self.leaves.values():
            if leaf.is_meta:
                check_leaves(entry.site.path, self.leaves, x)
        if x.is_nested:
            return over_values(self, entry.site, x)
        return entry.config.method.apply(entry.config, entry.site, self.leaves, self.base, x)

    def over(self, base: Any) -> Adapted:
        """The same adapter on another layer."""
        return Adapted(base, self.entry, self.leaves)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias with every adapter up to this one in, not yet rounded."""
        below: Any = self.base
        original = None if below.original is below else below.original.dense
        weight, bias = below.dense()
        return self.entry.merge(self.leaves, weight, bias, original)

    @property
    def original(self) -> Base:
        """The base without any adapter."""
        return self.base.original

    @property
    def training(self) -> bool:
        return self.base.training


class Cell:
    """What one call tells its sites. Each skeleton has one, so threads never share it.

    Attributes:
        trees: The active trees by adapter name, or what stands for one (`Active`).
        finder: Finds where the rows of a routed call are in a site's input.
        see: Told the path and the input of each site that runs, where somebody wants to look.
        reached: Collects the paths of the sites that ran.
        kept: The tensors, by identity of the model's, that a routed stack replaces row by row.
    """

    __slots__ = ("__weakref__", "finder", "kept", "reached", "see", "trees")

    def __init__(self) -> None:
        self.trees: Mapping[str, Any] | None = None
        self.finder: Finder | None = None
        self.see: Callable[[str, Tensor], None] | None = None
        self.reached: set[str] | None = None
        self.kept: dict[int, Tensor] | None = None

    def active(self, path: str) -> Mapping[str, Any]:
        """The active trees, for the site at a path.

        Raises:
            RuntimeError: No call is in progress.
        """
        if self.trees is None:
            raise RuntimeError(
                f"{path}: this adapted module ran outside any call of its graft; to keep an adapted module, take it "
                "from graft.view(params)"
            )
        return self.trees

    def clear(self) -> None:
        """End the call."""
        self.trees = self.reached = self.finder = self.kept = None


@dataclasses.dataclass(eq=False)
class Socket:
    """Everything an adapted module knows beyond its class."""

    path: str
    cell: Cell
    entries: Mapping[str, Entry]
    inner: Any
    argument: str
    cls: Any
    plain: Any

    def layer(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None, part: Part | None = None) -> Any:
        """The base under the active adapters, the first innermost; or a part of an attention's projection."""
        trees = self.cell.active(self.path)
        layer: Any = None
        for name, entry in self.entries.items():
            tree = trees.get(name)
            if tree is not None:
                below = layer or self._base(entry.site, args, kwargs, part)
                if type(tree) is dict:
                    layer = Adapted(below, entry, entry.leaves(tree))
                else:
                    layer = tree.layer(below, entry, self.cell.finder)
                if part is not None and not part.whole:
                    config, split = entry.config, entry.config.method.part
                    assert split is not None
                    layer.leaves = split(config, entry.site, layer.leaves, part.rows, part.columns)
        return layer or self._base(next(iter(self.entries.values())).site, args, kwargs, part)

    def _base(self, site: Site, args: tuple, kwargs: Mapping[str, Any] | None, part: Part | None) -> Any:
        return Base(self.inner, site, args, kwargs) if part is None else Projection(self.inner, site, part)

    def project(self, part: Part, x: Tensor) -> Tensor:
        """A part of an attention's projection, under the adapters."""
        self.look(x)
        return self.layer(part=part)(x)

    def look(self, x: Tensor) -> None:
        """Show an input to whoever wants to see."""
        if self.cell.see is not None:
            self.cell.see(self.path, x)

    def reach(self) -> None:
        """Note that a forward came by: it ran the module or read its weight."""
        if self.cell.reached is not None:
            self.cell.reached.add(self.path)

    def dense(self, name: str) -> Tensor | None:
        """The weight or bias that the module stores under a name, with the active adapters in, in the base's dtype."""
        layer, own = self.layer(), getattr(self.inner, name)
        if isinstance(layer, Base) or (own is not None and own.is_meta and resting(self.inner, name) is own):
            return own  # without values there is nothing to adapt: who offloads weights asks for these
        if _is_routed(layer):
            return self._without_value(getattr(self.inner, name))
        site: Site = layer.entry.site
        value = site.stored(*layer.dense()).get(name)
        return None if value is None else value.to(site.like(self.inner).dtype)

    def changed(self) -> dict[str, Any]:
        """The adapted weight and bias by the names that the module stores them under; nothing without an adapter."""
        layer = self.layer()
        if isinstance(layer, Base):
            return {}
        if _is_routed(layer):
            return dict.fromkeys(layer.entry.site.weight_names)
        site: Site = layer.entry.site
        dtype = site.like(self.inner).dtype
        return {name: value.to(dtype) for name, value in site.stored(*layer.dense()).items()}

    def _without_value(self, own: Tensor | None) -> Tensor | None:
        """What stands for a weight or bias where each row has its own."""
        return None if own is None else stand_in(own, self.path)


def _is_routed(layer: Any) -> bool:
    while not isinstance(layer, RoutedLayer):
        if not isinstance(layer, Adapted):
            return False
        layer = layer.base
    return True


class AdaptedForward:
    """Placed in front of the class that `Site.kind` speaks of: its forward under the adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        socket: Socket = self.__dict__["_socket"]
        if args:
            x, args = args[0], args[1:]
        elif socket.argument in kwargs:
            x = kwargs.pop(socket.argument)
        else:
            raise TypeError(f"{socket.path}: forward() got no {socket.argument!r}")
        socket.reach()
        socket.look(x)
        layer = socket.layer(args, kwargs)
        return layer(x) if type(x) is Tensor or not is_sharded(x) else run_on_shards(layer, x)


class AdaptedModule:
    """Mixed into the class of a targeted module: same attributes, adapted forward, adapted `weight` and `bias`.

    Parents that read `child.weight` instead of calling the child get the dense meaning, differentiable. So does a
    subclass with a forward of its own, unless that calls the inherited forward, which is the factored one.
    """

    def extra_repr(self) -> str:
        socket: Socket = self.__dict__["_socket"]
        names = ", ".join(f"{name!r}: {entry.config.method.name}" for name, entry in socket.entries.items())
        described = super().extra_repr()  # type: ignore[misc]
        return f"{described}, adapters={{{names}}}" if described else f"adapters={{{names}}}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        socket: Socket = self.__dict__["_socket"]
        saving.write(socket.path, destination, prefix, socket.changed(), keep_vars)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        socket: Socket = state.pop("_socket")
        return _revive, (socket.cls, socket.plain, socket.path, socket.cell, socket.entries), state

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModule:
        revive, args, state = self.__reduce_ex__(4)
        new = memo[id(self)] = revive(*copy.deepcopy(args, memo))
        new.__dict__.update(copy.deepcopy(state, memo))
        return new


def adapted_class(cls: Any, plain: Any, site: Site) -> type[nn.Module]:
    """`cls` with the adapted forward between its own and that of `plain`, and adapted weights."""
    return _adapted_class(cls, plain, site.weight_names, site.bias_name, site.kind == "attention")


@functools.lru_cache(maxsize=256)
def _adapted_class(cls: Any, plain: Any, weights: tuple[str, ...], bias: str, attention: bool) -> type[nn.Module]:
    core = _subclass(plain, (AdaptedAttention if attention else AdaptedForward, plain))
    held = {name: _held(name, True) for name in weights} | ({bias: _held(bias, False)} if weights else {})
    return _subclass(cls, (AdaptedModule, core) if cls is plain else (AdaptedModule, cls, core), **held)


def _held(name: str, counts: bool) -> property:
    """A weight or bias as parents see it; whoever reads a weight has reached the module."""

    def get(self: Any) -> Tensor | None:
        socket: Socket = self.__dict__["_socket"]
        if counts:
            socket.reach()
        return socket.dense(name)

    def put(self: Any, value: Tensor | None) -> None:
        setattr(self.__dict__["_socket"].inner, name, value)

    return property(get, put)


@functools.lru_cache(maxsize=256)
def inner_class(cls: Any, plain: Any) -> type[nn.Module]:
    """`cls` with the forward of `plain`."""
    return cls if cls.forward is plain.forward else _subclass(cls, (cls,), forward=plain.forward)


def _subclass(cls: Any, bases: tuple[Any, ...], **members: Any) -> Any:
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__, **members})


def adapt(shell: nn.Module, cls: Any, plain: Any, path: str, cell: Cell, entries: Mapping[str, Entry]) -> None:
    """Turn a bare copy of a module into an adapted one, in place.

    The copy keeps its `__dict__`; a second object of the plain class shares that dict and is the base layer, so
    hooks, flags and tensors stay one set.

    Args:
        shell: The copy.
        cls: Class of the user's module.
        plain: The class among its bases whose forward the adapters go around.
        path: Path of the user's module.
        cell: Cell of the skeleton.
        entries: Adapter entries by name.
    """
    inner = object.__new__(inner_class(cls, plain))
    object.__setattr__(inner, "__dict__", shell.__dict__)
    argument = next(iter(list(inspect.signature(plain.forward).parameters)[1:]), "input")
    shell.__class__ = adapted_class(cls, plain, next(iter(entries.values())).site)
    shell.__dict__["_socket"] = Socket(path, cell, entries, inner, argument, cls, plain)


def load_below(shell: Any) -> None:
    """Have accelerate's hooks of an adapted module load the base's tensors, whose names on it are the adapted ones."""
    own, inner = vars(shell), vars(shell)["_socket"].inner
    forward = own.get("forward")
    if "_hf_hook" in own and isinstance(forward, functools.partial):
        own["forward"] = functools.partial(forward.func, inner)


def _revive(cls: Any, plain: Any, path: str, cell: Cell, entries: Mapping[str, Entry]) -> nn.Module:
    """An adapted module without a state yet, for copies and pickles."""
    shell = object.__new__(cls)
    adapt(shell, cls, plain, path, cell, entries)
    return shell
