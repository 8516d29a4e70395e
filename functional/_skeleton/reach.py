"""Which objects lead to a model's modules or tensors, and have to be rebuilt around those of a copy."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ATOMIC = (
    type(None), bool, int, float, complex, str, bytes, type, range, slice,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator,
    torch.fx.Graph, torch.fx.Node,
)  # fmt: skip
"""Types of what is never copied, and leads nowhere."""

_ATOMIC = frozenset(ATOMIC)
_EMPTY = frozenset({dict, OrderedDict, set, list, tuple})
_TENSORS = frozenset({type(None), Tensor, nn.Parameter})
_REGISTRIES = ("_modules", "_parameters", "_buffers")


class Reach:
    """Tells whether a module or a tensor of a model can be reached from an object.

    >>> model = nn.Linear(2, 2)
    >>> reach = Reach(model)
    >>> reach.holds({"a": [model]}), reach.holds([torch.ones(2)])
    (True, False)
    """

    def __init__(self, model: nn.Module):
        self._own: set[int] = set()
        for module in model.modules():
            self._own.add(id(module))
            for registry in (module._parameters, module._buffers):
                self._own.update(id(tensor) for tensor in registry.values() if tensor is not None)
        self._apart: dict[int, Any] = {}

    def holds(self, x: Any) -> bool:
        """Return whether a module or tensor of the model can be reached from `x`."""
        seen: dict[int, Any] = {}
        stack = [x]
        while stack:
            item = stack.pop()
            if isinstance(item, ATOMIC) or id(item) in seen or id(item) in self._apart:
                continue
            if id(item) in self._own:
                return True
            seen[id(item)] = item
            if not isinstance(item, (nn.Module, Tensor)):
                stack.extend(_parts(item))
        self._apart.update(seen)
        return False


def is_plain(model: nn.Module) -> bool:
    """Return whether only registries of modules hold a model's modules and tensors, and all of these can be copied.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> before = is_plain(model)
    >>> model.kept = [model[0].weight]
    >>> before, is_plain(model)
    (True, False)
    """
    reach = Reach(model)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if not _TENSORS.issuperset(map(type, (*module._parameters.values(), *module._buffers.values()))):
            return False
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMIC or (kind in _EMPTY and not value) or key in _REGISTRIES:
                continue
            if reach.holds(value):
                return False
    return True


def _parts(x: Any) -> Iterator[Any]:
    if isinstance(x, dict):
        yield from x
        yield from x.values()
    elif isinstance(x, (list, tuple, set, frozenset, deque)):
        yield from x
    elif isinstance(x, types.MethodType):
        yield x.__self__
        yield x.__func__
    elif isinstance(x, types.FunctionType):
        yield from (cell.cell_contents for cell in x.__closure__ or () if is_filled(cell))
        yield x.__defaults__
        yield x.__kwdefaults__
        yield vars(x)
    elif isinstance(x, functools.partial):
        yield x.func
        yield x.args
        yield x.keywords
        yield vars(x)
    elif isinstance(x, weakref.ReferenceType):
        yield x()
    else:
        yield from gc.get_referents(x)


def is_filled(cell: types.CellType) -> bool:
    """Return whether a cell of a closure has a value."""
    try:
        cell.cell_contents  # noqa: B018 - reading an empty cell is the only way to learn that it is empty
    except ValueError:
        return False
    return True
