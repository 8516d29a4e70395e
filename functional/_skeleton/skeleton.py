"""Skeletons: structural copies of a module tree that share its tensors and nothing else."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._method import SiteAdapter
from .._sites.kernels import set_origin
from .._sites.kinds import forward_class
from .._sites.parameters import Key
from .._tensors.placement import copied_hooks, offloading
from .._tensors.wrappers import bare_name, check_flat
from .context import CallContext
from .parameters import ParameterRuntime, adapt_parameters, names_grouped
from .reach import ATOMIC, Reach, is_filled
from .recorded import Recorded, slots_of
from .runtime import adapt, load_below
from .sharded import attributes_of, hooks_of_unit, unsharded_type

Place = tuple[Any, Any]
"""Where a tensor hangs: a mutable container and the key in it."""


_CONTAINERS = (list, dict, set, deque)
_PLAIN = frozenset({OrderedDict, dict, set})
"""Classes of which a new object is a copy of an empty one, and is made in a tenth of the time."""


_INTERNAL = frozenset(vars(nn.Module()))
_ATOMIC = frozenset(ATOMIC)


class Skeleton:
    """A copy of `model` in which targeted modules are adapted and every tensor is a detached alias.

    Modules, plain containers, bound methods, partials, closures and objects that hold a module of the model
    are rebuilt around the copies; everything else is shared by reference.

    Args:
        model: The user's model; only read.
        adapters: Adapters by name, for each targeted module or parameter.
        paths: The path of each of these.
        context: What the call in progress tells the adapted modules.
        training: The mode that all modules of the copy are in; `None` for those of the model's.

    Attributes:
        root: The copy.
        context: What the call in progress tells the adapted modules.
        aliases: The detached alias of each tensor of the model, by the tensor's id.
        places: Where each alias hangs in the copy: containers and keys.
        sources: Where each named tensor hangs in the model, and its id.
        modules: The model's modules, those that it keeps in plain containers too, each with its copy.
        children: The registries of the model's modules, each with the submodules that are in it.
        filled: The tensors that the call in progress has replaced, by id.
        wrote: Whether the forward of the last call wrote to the skeleton.
        offloaded: The tensors of the model, by id, that hooks of accelerate load where they are called.
        volatile: Tensors that a forward may write to, and whether it may in the present modes.
        swaps: Where the tensors hang that adapters replace.
        in_steps: Whether all sites take one step, in which they look at the shapes of their leaves.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[Key, Mapping[str, SiteAdapter]],
        paths: Mapping[Key, str],
        context: CallContext | None = None,
        training: bool | None = None,
    ):
        self.context = context or CallContext()
        self._adapters, self._paths = adapters, paths
        named = list(model.named_modules(remove_duplicate=False))
        self._modules: dict[int, str] = {}
        for path, module in named:
            self._modules.setdefault(id(module), path)
        self._memo: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._reach = Reach(model)
        self._where = "the model"
        self.places: dict[int, list[Place]] = {}
        self.frozen: set[int] = set()
        self.aliases: dict[int, Tensor] = {}
        self._copies: list[Any] = []
        self.modules: list[tuple[nn.Module, Any]] = []
        self.root: nn.Module = self._copy(model)
        if training is not None:
            self._set_mode(model, training)
        self.children = [(m._modules, dict(m._modules)) for m in model.modules()]
        self.sources: dict[str, tuple[Any, str, int]] = {
            bare_name(f"{path}.{name}" if path else name): (registry, name, id(tensor))
            for path, module in named
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
            if tensor is not None
        }
        self.offloaded = {
            id(t) for m, _ in self.modules if next(offloading(m), None) is not None for t in m._parameters.values()
        }
        self.volatile = self._volatile()
        self.written = [key for key, active in self.volatile.items() if active]
        held = {id(container): container for places in self.places.values() for container, _ in places}
        self.containers = (getattr(self.context, "state", {}), *held.values())
        self.filled: Iterable[int] = ()
        self.wrote = False
        self.swaps: list[Any] = []
        self.in_steps = False
        del self._memo, self._keep, self._reach

    def remember(self) -> None:
        """Record the skeleton as it is now, before its first call: the state that each of them begins with."""
        places = [place for key in self.written for place in self.places[key]]
        places += [place for swap in self.swaps for place in swap.places]
        self.recorded = Recorded(self._copies, [container for container, _ in places])
        self.recorded.settle()

    def end(self, trusted: bool = False) -> list[int] | None:
        """End a call: undo whatever it and the model's forward wrote to the skeleton.

        Args:
            trusted: Whether the forward is known to have written nothing.

        Returns:
            `None`; or, if something outside still refers to a part of the skeleton and may run it again, the reference
            counts at which nothing does any more. The skeleton is then left as the call's forward left it.
        """
        recorded = self.recorded
        left = [(*place, _at(*place)) for key in self.filled for place in self.places[key]]
        self._put_back()
        self.wrote = changed = not trusted and recorded.changed()
        counts = recorded.own_counts() if changed else recorded.own
        if recorded.counts() != counts:
            for container, name, tensor in left:
                if tensor is not None:
                    container[name] = tensor
            return counts
        self.filled = ()
        self.context.clear()
        if changed:
            recorded.restore()
        return None

    def restore(self) -> None:
        """Undo whatever a call and the model's forward wrote to the skeleton."""
        self._put_back()
        self.filled = ()
        self.context.clear()
        self.recorded.restore()

    def _put_back(self) -> None:
        for key in self.filled:
            for container, name in self.places[key]:
                if isinstance(container, dict) or name < len(container):
                    container[name] = self.aliases[key]

    def own_buffers(self) -> None:
        """Give the skeleton its own copy of every tensor that a forward may write to."""
        for key in self.volatile:
            copied = self.aliases[key].clone()
            for container, name in self.places[key]:
                container[name] = copied

    def _set_mode(self, model: nn.Module, training: bool) -> None:
        """Put every module of the copy into a mode; those of TorchScript are the model's own, and have to be in it."""
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) and module.training != training:
                raise ValueError(
                    f"{path or 'the model'} is a module of TorchScript, which is never copied, and its mode is "
                    f"training={module.training}; call its {'train' if training else 'eval'}() first"
                )
        for _, own in self.modules:
            own.training = training

    def _volatile(self) -> dict[int, bool]:
        """Find tensors that a forward may write to, and whether it may in the modes that the modules are in now."""
        volatile: dict[int, bool] = {}
        for module, own in self.modules:
            tensors = self.places.keys() & {*map(id, module._buffers.values()), *map(id, vars(module).values())}
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                tensors.add(id(module.weight))
            active = own.training or not isinstance(module, _NormBase)
            volatile |= {key: volatile.get(key, False) or active for key in tensors}
        return volatile

    # -- copying ---------------------------------------------------------------------------------------------

    def _copy(self, x: Any) -> Any:
        if type(x) in _ATOMIC:
            return x
        if id(x) in self._memo:
            return self._memo[id(x)]
        if isinstance(x, Tensor):
            return self._remember(x, self._alias(x))
        if isinstance(x, weakref.ProxyTypes):
            return weakref.proxy(self._copy(_target(x)))
        if isinstance(x, nn.Module):  # most of what there is to copy: asked before the many kinds of the next line
            return self._module(x)
        if isinstance(x, ATOMIC):
            return x
        if isinstance(x, _CONTAINERS):
            return self._container(x)
        if isinstance(x, (tuple, frozenset)):
            return self._tuple(x)
        if not self._reach.holds(x):
            return self._remember(x, x)
        if isinstance(x, types.MethodType):
            owner = self._copy(x.__self__)
            name = getattr(x.__func__, "__name__", "")  # a partial has none
            named = getattr(type(x.__self__), name, None) is x.__func__
            func = getattr(type(owner), name) if named else self._copy(x.__func__)
            return types.MethodType(func, owner)
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, functools.partial):
            new = functools.partial(
                self._copy(x.func), *map(self._copy, x.args), **{k: self._copy(v) for k, v in x.keywords.items()}
            )
            vars(new).update({k: self._copy(v) for k, v in vars(x).items()})
            return self._remember(x, new)
        if isinstance(x, weakref.ReferenceType):
            return (weakref.WeakMethod if isinstance(x, weakref.WeakMethod) else weakref.ref)(self._copy(x()))
        return self._object(x)

    def _remember(self, old: Any, new: Any) -> Any:
        self._memo[id(old)] = new
        self._keep.append(old)
        if new is not old and not isinstance(new, Tensor):
            self._copies.append(new)
        return new

    def _alias(self, x: Tensor) -> Tensor:
        if isinstance(x, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(
                f"{self._where}: a parameter of a lazy module has no shape yet; run the model once before bind"
            )
        alias: Tensor
        if type(x) is nn.Parameter:
            alias = Tensor._make_subclass(nn.Parameter, x, False)  # detaches it
            set_origin(alias, x)
        else:
            alias = x.detach() if type(x) is Tensor or x.requires_grad else x
        self.aliases[id(x)] = alias
        self.places[id(x)] = []
        return alias

    def _put(self, container: Any, key: Any, value: Any) -> None:
        container[key] = self._copy(value)
        if isinstance(value, Tensor):
            self.places[id(value)].append((container, key))

    def _module(self, x: nn.Module) -> nn.Module:
        if isinstance(x, torch.jit.ScriptModule):
            self._remember(x, x)
            return x
        if (type(x).__module__, type(x).__name__) == ("torch._dynamo.eval_frame", "OptimizedModule"):
            raise TypeError(
                f"{self._modules.get(id(x)) or 'the model'}: a module compiled by torch.compile hides its structure; "
                "bind the module it was made from and compile a function that calls the graft"
            )
        check_flat(self._modules.get(id(x)) or "the model", x)
        cls = unsharded_type(x)
        self._memo.update(hooks_of_unit(x) | copied_hooks(x))
        new: nn.Module = self._remember(x, object.__new__(cls))
        self.modules.append((x, new))
        whole = (id(x), "")
        if whole in self._adapters:
            adapters = self._adapters[whole]
            forward = forward_class(x, next(iter(adapters.values())).site)
            adapt(new, cls, forward, self._paths[whole], self.context, adapters)
        self._adapt_parameters(x, new)
        where, self._where = self._where, self._modules.get(id(x)) or "the model"
        own = new.__dict__
        for key, value in attributes_of(x).items():
            kind = type(value)
            if kind in _ATOMIC:
                own[key] = value
            elif key in _INTERNAL and not value:
                own[key] = kind() if kind in _PLAIN else copy.copy(value)
            elif key in ("_parameters", "_buffers"):
                own[key] = registry = kind()
                for name, tensor in value.items():
                    self._put(registry, name, tensor)
            else:
                self._put(own, key, value)
        if whole in self._adapters:
            load_below(new)
        self._where = where
        return new

    def _adapt_parameters(self, x: nn.Module, new: nn.Module) -> None:
        keys = [key for name in x._parameters if (key := (id(x), name)) in self._adapters]
        if keys and next(offloading(x), None) is not None:
            raise ValueError(
                f"{self._paths[keys[0]]}: is offloaded by a hook of accelerate, which no adapter of a parameter can "
                "follow into a copy of its module; keep this module in memory, or call inject_adapter_in_model"
            )
        if keys:
            grouped = names_grouped(unsharded_type(x))
            runtimes = {
                key[1]: ParameterRuntime(self._paths[key], key[1], self.context, self._adapters[key], grouped)
                for key in keys
            }
            adapt_parameters(new, unsharded_type(x), runtimes)

    def _container(self, x: Any) -> Any:
        new = self._remember(x, copy.copy(x))
        if isinstance(x, dict):
            new.clear()
            for key, value in x.items():
                self._put(new, self._copy(key), value)
        elif isinstance(x, set):
            new.clear()
            new.update(map(self._copy, x))
        else:
            for index, value in enumerate(x):
                self._put(new, index, value)
        for key, value in getattr(x, "__dict__", {}).items():
            self._put(new.__dict__, key, value)
        return new

    def _tuple(self, x: Any) -> Any:
        items = [self._copy(item) for item in x]
        self.frozen.update(id(item) for item in x if isinstance(item, Tensor))
        if all(new is old for new, old in zip(items, x, strict=True)):
            return x
        if isinstance(x, tuple) and type(x) is not tuple and hasattr(x, "_make"):
            return self._remember(x, x._make(items))
        return self._remember(x, type(x)(items))

    def _function(self, x: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in x.__closure__ or ())
        new = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, cells or None)
        self._remember(x, new)
        for cell, old in zip(cells, x.__closure__ or (), strict=True):
            if is_filled(old):
                cell.cell_contents = self._copy(old.cell_contents)
        new.__defaults__ = self._copy(x.__defaults__)
        new.__kwdefaults__ = self._copy(x.__kwdefaults__)
        vars(new).update({key: self._copy(value) for key, value in vars(x).items()})
        new.__qualname__, new.__doc__, new.__annotations__ = x.__qualname__, x.__doc__, x.__annotations__
        return new

    def _object(self, x: Any) -> Any:
        try:
            new = self._remember(x, object.__new__(type(x)))
        except TypeError:
            raise TypeError(
                f"{self._where}: an attribute of type {type(x).__module__}.{type(x).__qualname__} holds a module of "
                "the model and cannot be rebuilt around an adapted copy; keep the module in a submodule, list or dict"
            ) from None
        for key, value in _attributes(x):
            object.__setattr__(new, key, self._copy(value))
        return new


def _target(proxy: Any) -> Any:
    """Return the object of a weak proxy: the owner of its methods."""
    return proxy.__repr__.__self__


def _attributes(x: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(x, "__dict__", {}).items()
    yield from ((name, getattr(x, name)) for name in slots_of(x) if hasattr(x, name))


def _at(container: Any, key: Any) -> Any:
    """Return what hangs at a place, if anything does."""
    try:
        return container[key]
    except LookupError:
        return None
