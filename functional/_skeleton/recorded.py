"""Recorded state: what the copies in a skeleton are between calls, the way back, and whether anyone still uses them.

A forward may write to the modules it runs: attributes, caches, hooks, submodules, classes. And what it leaves in the
autograd graph may run it once more during backward: activation checkpointing, a `torch.autograd.Function` that holds
a layer. Whoever can do that refers to some part of the skeleton, so that reference counts tell.
"""

from __future__ import annotations

import functools
import gc
import operator
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from .._versions import DictContents, is_single

_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


_CARRIERS = (*_CONTAINERS, tuple, frozenset, types.MethodType, types.CellType, functools.partial)


_QUIET = frozenset(
    name
    for name in vars(nn.Module())
    if "state_dict" in name or name.endswith(("_with_kwargs", "_always_called", "_buffers_set"))
)
"""Registries of a module that have no part in a forward, or that only change together with another one."""


_MISSING = object()


class Recorded:
    """The state of objects at one moment: their contents, attributes and classes.

    Args:
        objects: Modules, plain containers, functions and other objects; what they refer to is recorded with them only
            if it is among them, is a module's registry or is a function's closure.
        exchanged: Dicts among these that each call writes to and puts back; they are looked at in any case, and the
            others where their version numbers say that they were written to.

    >>> layer, cache = nn.Linear(2, 2), {}
    >>> recorded = Recorded([layer, cache])
    >>> _, cache["calls"] = layer.register_forward_hook(print), 1
    >>> recorded.changed()
    True
    >>> recorded.restore()
    >>> recorded.changed(), len(layer._forward_hooks), cache
    (False, 0, {})
    """

    def __init__(self, objects: Iterable[Any], exchanged: Iterable[Any] = ()):
        self._objects = list(objects)
        containers = list({id(c): c for c in chain.from_iterable(map(_containers, self._objects))}.values())
        self.ids = {id(x) for x in (*self._objects, *containers)}
        self._empty = [container for container in containers if not container]
        quiet = {id(vars(x)[name]) for x in self._objects if isinstance(x, nn.Module) for name in _QUIET}
        self._watched = sorted([container for container in self._empty if id(container) not in quiet], key=id)
        full = [container for container in containers if container]
        dicts, known = [container for container in full if isinstance(container, dict)], set(map(id, exchanged))
        self._contents = DictContents(one for one in dicts if id(one) not in known)
        self._exchanged = DictContents(one for one in dicts if id(one) in known)
        self._lists = [container for container in full if not isinstance(container, dict)]
        self._saved = list(map(_saved, self._lists))
        self._instances = [x for x in self._objects if hasattr(x, "__dict__") and not isinstance(x, types.FunctionType)]
        self._classes = list(map(type, self._instances))
        self._slots = [(x, name, getattr(x, name, _MISSING)) for x in self._objects for name in slots_of(x)]
        functions = [x for x in self._objects if isinstance(x, types.FunctionType)]
        self._cells = [(cell, _content(cell)) for x in functions for cell in x.__closure__ or ()]
        # An equal tensor of one element may be another one, with a graph or a batch axis of its own.
        self._single = [(values, list(values)) for values in self._lists if any(map(is_single, values))]
        self.own: list[int] = []

    def changed(self) -> bool:
        """Return whether anything is not as it was."""
        try:
            return (
                any(self._watched)
                or not (self._contents.same() and self._exchanged.same())
                or not all(map(operator.eq, self._lists, self._saved))
                or list(map(type, self._instances)) != self._classes
                or any(getattr(x, name, _MISSING) is not value for x, name, value in self._slots)
                or any(_content(cell) is not content for cell, content in self._cells)
                or not all(all(map(operator.is_, values, saved)) for values, saved in self._single)
            )
        except Exception:  # tensors that were exchanged may refuse to be compared
            return True

    def restore(self) -> None:
        """Restore every object to its recorded state."""
        for x, cls in zip(self._instances, self._classes, strict=True):
            if type(x) is not cls:
                object.__setattr__(x, "__class__", cls)
        for container, saved in self._pairs():
            _refill(container, saved)
        for x, name, value in self._slots:
            if value is not _MISSING:
                object.__setattr__(x, name, value)
            elif hasattr(x, name):
                object.__delattr__(x, name)
        for cell, content in self._cells:
            if content is _MISSING:
                del cell.cell_contents
            else:
                cell.cell_contents = content

    def settle(self) -> None:
        """Take the references that there are now for those of the objects themselves."""
        self.own = self.counts()

    def counts(self) -> list[int]:
        """Count the references to each object."""
        return list(map(sys.getrefcount, self._objects))

    def own_counts(self) -> list[int]:
        """Count the objects' references to each other, as they are by now."""
        added = {id(x): 0 for x in self._objects}
        for container, saved in self._pairs():
            for sign, start in ((1, container), (-1, saved)):
                for x in _referents(start, added):
                    added[id(x)] += sign
        return [count + added[id(x)] for x, count in zip(self._objects, self.own, strict=True)]

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """Yield containers that have changed, each with what was in it."""
        dicts = [zip(contents.dicts, contents.saved, strict=True) for contents in (self._contents, self._exchanged)]
        for container, saved in chain(*dicts, zip(self._lists, self._saved, strict=True)):
            if not _same(container, saved):
                yield container, saved
        for container in self._empty:
            if container:
                yield container, type(_saved(container))()


def slots_of(x: Any) -> tuple[str, ...]:
    """Return the attributes that an object has outside of its `__dict__`."""
    cls: Any = type(x)
    return _slots_of(cls)


@functools.lru_cache(maxsize=1024)
def _slots_of(cls: Any) -> tuple[str, ...]:
    declared = (base.__dict__.get("__slots__", ()) for base in cls.__mro__)
    names = chain.from_iterable((slots,) if isinstance(slots, str) else slots for slots in declared)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _containers(x: Any) -> Iterator[Any]:
    if isinstance(x, _CONTAINERS):
        yield x
    if isinstance(x, nn.Module):
        yield from (value for value in vars(x).values() if type(value) in (dict, OrderedDict, set))
    if hasattr(x, "__dict__"):
        yield vars(x)


def _saved(container: Any) -> Any:
    base: Any = next(cls for cls in (dict, list, set, deque) if isinstance(container, cls))
    return base(container)


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _same(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if isinstance(container, set):
        return bool(container == saved)
    if isinstance(container, dict) and container.keys() != saved.keys():
        return False
    return all(map(operator.is_, _values(container), _values(saved)))


def _refill(container: Any, saved: Any) -> None:
    base: Any = next(cls for cls in _CONTAINERS if isinstance(container, cls))
    base.clear(container)
    (base.update if isinstance(saved, (dict, set)) else base.extend)(container, saved)


def _referents(start: Any, known: dict[int, int]) -> Iterator[Any]:
    """Yield the known objects that a container leads to, each as often as it is referred to."""
    seen: set[int] = set()
    stack = [start]
    while stack:
        for x in gc.get_referents(stack.pop()):
            if id(x) in known:
                yield x
            elif id(x) not in seen:
                seen.add(id(x))
                if isinstance(x, types.FunctionType):
                    stack += [x.__closure__, x.__defaults__, x.__kwdefaults__, vars(x)]
                elif isinstance(x, nn.Module):
                    stack.append(vars(x))
                elif isinstance(x, _CARRIERS):
                    stack.append(x)
