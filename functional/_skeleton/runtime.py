"""Adapted modules: the user's own classes, with the adapter in their forward and in their weight."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.compiler import is_compiling

from .._abilities import Step
from .._layers.adapted import Adapted, step_of
from .._layers.base import Base
from .._layers.compose import compose
from .._layers.gathered import run_on_shards
from .._layers.no_weight import stand_in
from .._layers.projection import Projection
from .._layers.routed import RoutedLayer
from .._method import SiteAdapter
from .._sites.attention import ProjectionSlice
from .._sites.kernels import is_folded
from .._sites.kinds import has_linear_forward
from .._sites.site import Site
from .._tensors.placement import is_sharded, resting
from . import saving
from .attention import AdaptedAttention
from .context import CallContext


@dataclasses.dataclass(eq=False)
class SiteRuntime:
    """The facts that an adapted module has beyond its class."""

    path: str
    context: CallContext
    entries: Mapping[str, SiteAdapter]
    inner: Any
    argument: str
    cls: Any
    forward_class: Any

    step: ClassVar[tuple[Step, str, str] | None] = None
    """What calls take instead of layers where that is decided, the name of its adapter, and the path of its leaves."""

    def decide(self) -> None:
        """Decide what can be decided before calls, for the entries there are."""
        cls: Any = type(self.inner)
        step = step_of(self.entries.values()) if has_linear_forward(cls) else None
        (name, adapter), *_ = self.entries.items()
        vars(self)["step"] = None if step is None else (step, name, adapter.site.path)

    def run_in_one_step(self, x: Any, module: Mapping[str, Any]) -> Tensor | None:
        """Return the output of the one step; `None` unless one tree is active, no look is in progress, and it fits.

        Args:
            x: The input.
            module: Attributes of the module.
        """
        assert self.step is not None
        (step, name, path), context, held = self.step, self.context, module["_parameters"]
        tree = None if context.trees is None or context.see is not None else context.trees.get(name)
        if type(tree) is not dict or "weight" not in held:
            return None
        weight, bias, leaves = held["weight"], held["bias"], tree[path]
        y = None if is_folded(x, weight, bias) else step(x, weight, bias, leaves, module["training"])
        if context.reached is not None:
            context.reached.add(self.path)
        return y

    def run(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the adapted output."""
        layer = self.layer(args, kwargs)
        result: Tensor = layer(x) if type(x) is Tensor or not is_sharded(x) else run_on_shards(layer, x)
        return result

    def layer(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, part: ProjectionSlice | None = None
    ) -> Any:
        """Return the base under the active adapters, the first innermost; or a part of an attention's projection."""
        base = self._base(next(iter(self.entries.values())).site, args, kwargs, part)
        return compose(base, self.entries, self.context.active(self.path), self.context.finder, part)

    def _base(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, part: ProjectionSlice | None
    ) -> Any:
        return Base(self.inner, site, args, kwargs) if part is None else Projection(self.inner, site, part)

    def project(self, part: ProjectionSlice, x: Tensor) -> Tensor:
        """Call a part of an attention's projection, under the adapters."""
        self.look(x)
        result: Tensor = self.layer(part=part)(x)
        return result

    def enter(self, x: Tensor) -> None:
        """Note that a forward ran the module, with this input."""
        context = self.context
        if context.reached is not None:
            context.reached.add(self.path)
        if context.see is not None:
            context.see(self.path, x)

    def look(self, x: Tensor) -> None:
        """Call `see(path, x)` with an input, where the context has a `see`."""
        if self.context.see is not None:
            self.context.see(self.path, x)

    def reach(self) -> None:
        """Note that a forward reached the site: it ran the module or read its weight."""
        if self.context.reached is not None:
            self.context.reached.add(self.path)

    def dense(self, name: str) -> Tensor | None:
        """Return the weight or bias stored under a name, with the active adapters in, in the base's dtype."""
        layer, tensor = self.layer(), getattr(self.inner, name)
        if isinstance(layer, Base) or (tensor is not None and tensor.is_meta and resting(self.inner, name) is tensor):
            # Without values there is nothing to adapt: code that offloads weights reads these.
            result: Tensor | None = tensor
            return result
        if _is_routed(layer):
            return self._without_value(getattr(self.inner, name))
        site: Site = layer.entry.site
        value = site.stored(*layer.dense()).get(name)
        return None if value is None else value.to(site.like(self.inner).dtype)

    def changed(self) -> dict[str, Any]:
        """Return the adapted weight and bias by the names that the module has for them; none without an adapter."""
        layer = self.layer()
        if isinstance(layer, Base):
            return {}
        if _is_routed(layer):
            return dict.fromkeys(layer.entry.site.weight_names)
        site: Site = layer.entry.site
        dtype = site.like(self.inner).dtype
        return {name: value.to(dtype) for name, value in site.stored(*layer.dense()).items()}

    def _without_value(self, tensor: Tensor | None) -> Tensor | None:
        """Return a placeholder for a weight or bias where each row has its own."""
        return None if tensor is None else stand_in(tensor, self.path)


def _is_routed(layer: Any) -> bool:
    while not isinstance(layer, RoutedLayer):
        if not isinstance(layer, Adapted):
            return False
        layer = layer.base
    return True


class AdaptedForward:
    """A base class in front of the class that `Site.kind` speaks of: its forward under the adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own = self.__dict__
        runtime: SiteRuntime = own["_runtime"]
        if runtime.step is not None and len(args) == 1 and not (kwargs or is_compiling()):
            y = runtime.run_in_one_step(args[0], own)
            if y is not None:
                return y
        if args:
            x, args = args[0], args[1:]
        elif runtime.argument in kwargs:
            x = kwargs.pop(runtime.argument)
        else:
            raise TypeError(f"{runtime.path}: forward() got no {runtime.argument!r}")
        runtime.enter(x)
        return runtime.run(x, args, kwargs)


class AdaptedModule:
    """A base class of targeted modules: same attributes, adapted forward, adapted `weight` and `bias`.

    Parents that read `child.weight` instead of calling the child get the dense meaning, differentiable. So does a
    subclass with a forward of its own, unless that calls the inherited forward, which is the factored one.
    """

    def extra_repr(self) -> str:
        runtime: SiteRuntime = self.__dict__["_runtime"]
        names = ", ".join(f"{name!r}: {adapter.config.method.name}" for name, adapter in runtime.entries.items())
        described = super().extra_repr()  # type: ignore[misc]
        return f"{described}, adapters={{{names}}}" if described else f"adapters={{{names}}}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        runtime: SiteRuntime = self.__dict__["_runtime"]
        saving.write(runtime.path, destination, prefix, runtime.changed(), keep_vars)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        runtime: SiteRuntime = state.pop("_runtime")
        return _revive, (runtime.cls, runtime.forward_class, runtime.path, runtime.context, runtime.entries), state

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModule:
        revive, args, state = self.__reduce_ex__(4)
        new = memo[id(self)] = revive(*copy.deepcopy(args, memo))
        new.__dict__.update(copy.deepcopy(state, memo))
        result: AdaptedModule = new
        return result


def adapted_class(cls: Any, forward_class: Any, site: Site) -> type[nn.Module]:
    """Return `cls` with the adapted forward between its own and that of `forward_class`, and adapted weights."""
    return _adapted_class(cls, forward_class, site.weight_names, site.bias_name, site.kind == "attention")


@functools.lru_cache(maxsize=256)
def _adapted_class(
    cls: Any, forward_class: Any, weights: tuple[str, ...], bias: str, attention: bool
) -> type[nn.Module]:
    core = _subclass(forward_class, (AdaptedAttention if attention else AdaptedForward, forward_class))
    held = {name: _held(name, True) for name in weights} | ({bias: _held(bias, False)} if weights else {})
    result: type[nn.Module] = _subclass(
        cls, (AdaptedModule, core) if cls is forward_class else (AdaptedModule, cls, core), **held
    )
    return result


def _held(name: str, counts: bool) -> property:
    """Return a weight or bias as parents see it; reading a weight counts as reaching the module."""

    def get(self: Any) -> Tensor | None:
        runtime: SiteRuntime = self.__dict__["_runtime"]
        if counts:
            runtime.reach()
        return runtime.dense(name)

    def put(self: Any, value: Tensor | None) -> None:
        setattr(self.__dict__["_runtime"].inner, name, value)

    return property(get, put)


@functools.lru_cache(maxsize=256)
def inner_class(cls: Any, forward_class: Any) -> type[nn.Module]:
    """Return `cls` with the forward of `forward_class`."""
    result: type[nn.Module] = (
        cls if cls.forward is forward_class.forward else _subclass(cls, (cls,), forward=forward_class.forward)
    )
    return result


def _subclass(cls: Any, bases: tuple[Any, ...], **members: Any) -> Any:
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__, **members})


def adapt(
    shell: nn.Module, cls: Any, forward_class: Any, path: str, context: CallContext, adapters: Mapping[str, SiteAdapter]
) -> None:
    """Turn a bare copy of a module into an adapted one, in place.

    The copy keeps its `__dict__`; a second object, with the forward of `forward_class`, shares that dict and is the
    base layer, so hooks, flags and tensors stay one set.

    Args:
        shell: The copy.
        cls: Class of the user's module.
        forward_class: The class among its bases whose forward the adapters go around.
        path: Path of the user's module.
        context: CallContext of the skeleton.
        adapters: Adapters by name, the innermost first.
    """
    inner = object.__new__(inner_class(cls, forward_class))
    object.__setattr__(inner, "__dict__", shell.__dict__)
    argument = _first_argument(forward_class.forward)
    adapted = adapted_class(cls, forward_class, next(iter(adapters.values())).site)
    object.__setattr__(shell, "__class__", adapted)
    shell.__dict__["_runtime"] = runtime = SiteRuntime(path, context, adapters, inner, argument, cls, forward_class)
    runtime.decide()


@functools.lru_cache(maxsize=256)
def _first_argument(forward: Any) -> str:
    """Return the name of the first argument of a forward, after the module."""
    return next(iter(list(inspect.signature(forward).parameters)[1:]), "input")


def load_below(shell: Any) -> None:
    """Have accelerate's hooks of an adapted module load the base's tensors, whose names on it are the adapted ones."""
    attributes, inner = vars(shell), vars(shell)["_runtime"].inner
    forward = attributes.get("forward")
    if "_hf_hook" in attributes and isinstance(forward, functools.partial):
        attributes["forward"] = functools.partial(forward.func, inner)


def _revive(
    cls: Any, forward_class: Any, path: str, context: CallContext, adapters: Mapping[str, SiteAdapter]
) -> nn.Module:
    """Make an adapted module without a state yet, for copies and pickles."""
    shell = object.__new__(cls)
    adapt(shell, cls, forward_class, path, context, adapters)
    result: nn.Module = shell
    return result
